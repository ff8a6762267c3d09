"""Comparisons of operators, clusters and sizes."""
