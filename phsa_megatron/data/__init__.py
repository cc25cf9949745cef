"""Tokenizer, corpus preparation, indexed sets, the order of sequences, and batches."""
