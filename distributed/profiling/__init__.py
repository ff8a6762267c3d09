"""Measures the memory of a rank.

recorder           records a rank's peak memory phase by phase
allocation_tracer  traces torch's CPU allocator; counts live tensors and tensors saved for backward
engine_tensors     the tensors of a DeepSpeed engine by item of the memory breakdown
single_process     forward and backward on one process, without DeepSpeed
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
