"""PHSA kernels: the ops of the method behind one public door, `phsa_kernels.api`."""

from phsa_kernels.api import PHSAOutput, attend, phsa_attention, pool, select

__all__ = ["PHSAOutput", "attend", "phsa_attention", "pool", "select"]
