"""Measured memory: allocation events, process memory, the engine's tensors."""
