"""Clusters: GPUs, nodes, their published and measured figures, and what a device holds besides torch's tensors.

Published figures, such as the H100's memory bandwidth, are in data/clusters.yaml; measured sizes of CUDA contexts,
driver reserves and NCCL channels are in data/device_overhead.yaml.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
