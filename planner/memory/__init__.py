"""The memory of a rank: predicted peaks per phase and tier, upper bounds, the timeline of a step."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
