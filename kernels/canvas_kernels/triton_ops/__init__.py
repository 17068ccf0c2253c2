"""The operations as Triton kernels: configurations and tilings (which import no triton), launches, passes."""
