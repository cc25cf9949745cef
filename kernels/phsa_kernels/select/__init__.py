"""The select kernels."""
