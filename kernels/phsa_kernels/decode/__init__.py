"""Attention of one new token a sequence over a cache: the ops of generation."""
