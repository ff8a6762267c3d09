"""The operators as PyTorch layers, and the tables that hold their matrices."""
