"""Clusters, GPUs and their figures, each with its source: memory, rates, what a GPU holds beside tensors."""
