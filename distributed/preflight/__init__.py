"""Checks of the machines of a plan before a launch, on this machine and on every host."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
