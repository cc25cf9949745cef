"""Typed configuration: schema, composition, derivation, validation. Torch-free."""
