"""Train plans with DeepSpeed: prepare data, check machines, launch ranks, save and resume, and measure memory.

The public face: `launch` and the types it takes and returns, `read_run_status`, `prepare_tokens`, and the experiments.
Names are imported when they are first used, so that importing the package needs neither torch nor DeepSpeed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
