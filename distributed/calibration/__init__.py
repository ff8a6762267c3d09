"""Measures the rates of this machine: matrix products, memory, collectives, copies, optimizers, NVMe.

run                starts the ranks and makes a cluster file of their measurements
microbenchmarks    what each rank measures
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
