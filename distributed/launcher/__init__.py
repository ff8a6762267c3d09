"""Launch a plan: start its ranks on this machine or on the hosts of a hostfile, and watch them until they end."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
