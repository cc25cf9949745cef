"""The launcher: composes a recipe once and starts it. Torch-free."""
