"""Measures what a plan predicts: all ranks for a few steps, or one rank of a large plan alone.

measured_run       runs a plan for a few steps and measures each rank
rehearsal          runs one rank of a planned world alone, in its own process
rehearsal_rank     that rank: DeepSpeed's real engine in a fake process group
fake_process_group a process group without other ranks
fake_compute       allocates the results of matrix products without computing them
extrapolate        from a rehearsal of some layers to the complete model
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
