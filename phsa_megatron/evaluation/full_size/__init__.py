"""Whole training steps of a model at full size on one GPU: rows, a profile, loss curves."""
