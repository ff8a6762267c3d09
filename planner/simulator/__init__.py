"""Simulation of a rank's memory: every allocation and release of its lifecycle, from init to resume, without values.

`lifecycle.simulate` runs it. `network` allocates what the model's operations allocate, `engine` what DeepSpeed
allocates (`engine/coordinator.py` predicts the size of a gathered tile), and `core` counts bytes by phase and tier.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
