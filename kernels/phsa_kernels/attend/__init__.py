"""The attend kernels."""
