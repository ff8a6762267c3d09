"""Small experiments that compare the operators: what they train and test, and how they run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
