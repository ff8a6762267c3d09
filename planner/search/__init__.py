"""The search for the best plan of a model on a cluster, its reasons and its advice."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
