"""Training a plan with DeepSpeed: the ranks' entry point, launching, measuring."""
