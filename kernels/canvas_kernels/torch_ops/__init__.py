"""The operations in plain torch, grouped: the default on CPUs."""
