"""Processes and their groups; the CPU shim and what differs between megatron-core versions."""
