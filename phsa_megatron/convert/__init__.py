"""Hugging Face folders to checkpoints and back, and PHSA inside of transformers."""
