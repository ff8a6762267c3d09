"""What a user specifies: the model, the training, ZeRO, the data set. Validated and frozen."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
