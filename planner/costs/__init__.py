"""Costs of a model in closed form: parameters, FLOPs, matrix products, optimizer states, communication volume."""
