"""Simulation of the networks: what each module allocates in forward and backward."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
