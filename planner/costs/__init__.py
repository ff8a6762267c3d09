"""Costs of a model in closed form: parameters, FLOPs, matrix products, optimizer states, communication volume."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
