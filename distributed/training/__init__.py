"""Training on one rank.

rank               the process of a rank: `train`, the entry point of every rank
trainer            the training loop, its measurement and checkpoints
engine             the model under DeepSpeed's engine: process group, construction, loss, gradients
evaluation         held-out samples: how many, in passes of which size
run_log            the rank's status and the metrics of the run
monitor            metrics to CSV files, TensorBoard or Weights & Biases
lr_schedule        warm-up and cosine
nonfinite          finds the first value or gradient that is not finite
deepspeed_fixes    all patches of DeepSpeed for training
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
