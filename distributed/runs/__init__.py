"""The run folder: its files, and the status, heartbeat and measurements of the ranks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
