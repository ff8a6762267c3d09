"""Readers of what reports show: predictions of plans, measurements of runs, and records of benchmarks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
