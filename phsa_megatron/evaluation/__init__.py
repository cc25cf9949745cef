"""Judging a model and its selectors: needles, information loss, comparisons, tables and plots."""
