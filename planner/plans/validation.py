"""Checks of a plan: the data suits the model, and the predicted memory fits the cluster."""

from __future__ import annotations

from ..common.errors import DoesNotFitError, InputError
from ..common.units import format_bytes
from ..config.datasets import DIGITS, DIGITS_TRAINING_SAMPLES, check_kind
from ..config.model import ModelSpec, VitSpec
from ..config.training import TrainingSpec
from ..memory.estimate import gathered_floor_bytes
from .plan import Plan


def _check_augmentation(spec: ModelSpec, training: TrainingSpec) -> None:
    name, padding = training.augmentation, training.crop_padding
    if name and not isinstance(spec, VitSpec):
        off = TrainingSpec.model_fields[name].default
        raise InputError(f"{name}: {getattr(training, name)} is not allowed: must be {off} with a gpt model")
    if isinstance(spec, VitSpec) and padding >= min(spec.image):
        raise InputError(f"crop_padding: {padding} is not allowed: must be below {min(spec.image)}, the image's side")


def check_data(spec: ModelSpec, training: TrainingSpec, global_batch: int) -> None:
    """Check that data and augmentation suit the model, and that the data set has enough samples for a step.

    Args:
        spec: the model.
        training: names the data and the augmentation.
        global_batch: samples of one optimizer step over all ranks.

    Raises:
        InputError: naming the field.
    """
    _check_augmentation(spec, training)
    if training.data in DIGITS and global_batch > DIGITS_TRAINING_SAMPLES:
        raise InputError(
            f"global batch: {global_batch} (micro-batch x accumulation x ranks) is not allowed: must be at most "
            f"{DIGITS_TRAINING_SAMPLES}, the training samples of digits"
        )
    check_kind(spec, training.data, training.digit_pixels)
    if training.evaluation_data is not None:
        check_kind(spec, training.evaluation_data, training.digit_pixels, "evaluation_data")


def check_capacity(plan: Plan) -> None:
    """Check that the predicted memory fits the cluster.

    Raises:
        DoesNotFitError: if it exceeds the memory of a rank's device or of a node's host.
    """
    cluster, zero, prediction, tile_relations = plan.cluster, plan.zero, plan.prediction, plan.tile_relations
    subject = f"{plan.model.name} does not fit on {cluster.name} with ZeRO-{zero.stage}"
    if prediction.peak_bytes > cluster.device_memory_bytes:
        floor = gathered_floor_bytes(plan.model, plan.training, tile_relations)
        if zero.stage == 3 and tile_relations and floor > cluster.device_memory_bytes:
            smaller = tile_relations * cluster.device_memory_bytes // (2 * floor)
            advice = f"tile_relations: {max(1, smaller)}" if smaller else "a narrower model"
            raise DoesNotFitError(
                f"{subject}: every rank gathers a full tile of {tile_relations} relations, with its gradients "
                f"{format_bytes(floor)}; a rank has {format_bytes(cluster.device_memory_bytes)}: use {advice}"
            )
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(prediction.peak_bytes)} per rank, of which "
            f"{format_bytes(prediction.resident_bytes)} are states; a rank has "
            f"{format_bytes(cluster.device_memory_bytes)}: use more ranks, offload, a higher stage or a smaller "
            "micro-batch"
        )
    host = prediction.host_bytes * cluster.ranks_per_node
    if cluster.device == "cuda" and host > cluster.host_memory_bytes:
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(host)} of host memory per node; "
            f"a node has {format_bytes(cluster.host_memory_bytes)}: use more nodes or another offload mode"
        )
