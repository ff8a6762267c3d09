"""This machine: environment, packages, compiled ops, memory, file systems, network, signals."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
