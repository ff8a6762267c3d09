"""Checkpoints of a run: saved, loaded, resharded and exported.

save_load          saves complete checkpoints; loads them into an engine of the same layout
manifest           the manifest that makes a checkpoint complete; finds the newest one
resume             chooses the run to resume and checks that a plan can resume it
reshard            loads a checkpoint into an engine of another layout
reader             reads any layout parameter by parameter
shard_layout       positions of parameters in the ranks' flat vectors, and of tiles in their tables
unpickle           reads torch's files without DeepSpeed's classes
weights            network files: from the authors' checkpoints and back, and a run's first weights
exporter           writes the network as one safetensors file
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
