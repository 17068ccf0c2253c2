"""Every attention function, canvas_attention, a program and a graft in every mode of torch."""
