"""The pool kernels."""
