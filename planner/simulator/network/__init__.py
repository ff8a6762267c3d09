"""What the networks allocate in forward and backward, module by module."""
