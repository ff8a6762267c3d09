"""Closed forms: parameters, FLOPs, matrix products, optimizer states, communication volume."""
