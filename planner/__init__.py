"""Predict what a Translution model costs, and plan its training on a cluster, without torch, pandas or DeepSpeed.

The public face: `load_model`, `load_cluster`, `estimate`, `plan`, `load_plan`, `compare`, `scaling` and the types that
they return. Names are imported when they are first used, so that importing the package stays fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
