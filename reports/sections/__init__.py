"""The sections of a report, one module per topic: each turns data into tables and pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
