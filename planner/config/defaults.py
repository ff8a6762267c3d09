"""Defaults that every command, the Python functions and the calculator share: the dtype and the data of a training."""

from __future__ import annotations

from ..common.types import Precision
from ..hardware.cluster import ClusterSpec
from .datasets import DIGITS_CLASSES, MOVING_DIGITS, DataKind
from .model import ModelSpec, VideoSpec, VitSpec

GPU_PRECISION: Precision = "bf16"
"""Default dtype on GPUs."""


def default_precision(cluster: ClusterSpec) -> Precision:
    """Return the dtype in which a model trains unless another one is given.

    It is bf16 on GPUs, fp16 on those whose figures have fp16 and no bf16, such as the V100, and fp32 on CPU ranks,
    which have no units for less.

    Args:
        cluster: where the model trains.
    """
    if cluster.device == "cpu":
        return "fp32"
    measured = {point.precision for point in cluster.measured.matmul} if cluster.measured else set()
    lacks_bf16 = cluster.bf16_flops_per_s is None and "bf16" not in measured
    return "fp16" if lacks_bf16 and cluster.fp16_flops_per_s is not None else GPU_PRECISION


def default_data(spec: ModelSpec) -> DataKind:
    """Return the data on which a model trains unless others are given.

    They are handwritten digits for a model of just these, with one channel and ten classes, and synthetic otherwise.

    Args:
        spec: the model.
    """
    if isinstance(spec, VitSpec | VideoSpec) and spec.channels == 1 and spec.classes == DIGITS_CLASSES:
        return MOVING_DIGITS if isinstance(spec, VideoSpec) else "digits"
    return "synthetic"
