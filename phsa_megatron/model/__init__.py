"""From the schema to a megatron-core model, behind one factory."""
