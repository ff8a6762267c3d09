"""Checks of a plan: data that suits the model, and room on the cluster."""

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
    """Refuse data or augmentation that does not suit the model, or more samples in a step than there are.

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


def _check_room(plan: Plan) -> None:
    """Refuse what a rank's device or a node's host memory has no room for."""
    spec, cluster, training, zero, prediction = plan.model, plan.cluster, plan.training, plan.zero, plan.prediction
    tile_relations = plan.tile_relations
    subject = f"{spec.name} does not fit on {cluster.name} with ZeRO-{zero.stage}"
    if prediction.peak_bytes > cluster.device_memory_bytes:
        floor = gathered_floor_bytes(spec, training, tile_relations)
        if zero.stage == 3 and tile_relations and floor > cluster.device_memory_bytes:
            smaller = tile_relations * cluster.device_memory_bytes // (2 * floor)
            advice = f"tile_relations: {max(1, smaller)}" if smaller else "a narrower model"
            raise DoesNotFitError(
                f"{subject}: a tile of {tile_relations} relations and its gradients take {format_bytes(floor)}, "
                f"whole, on every rank; a rank has {format_bytes(cluster.device_memory_bytes)}: take {advice}"
            )
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(prediction.peak_bytes)} per rank, of which "
            f"{format_bytes(prediction.resident_bytes)} are states; a rank has "
            f"{format_bytes(cluster.device_memory_bytes)}: take more ranks, offload, a higher stage or a smaller "
            "micro-batch"
        )
    host = prediction.host_bytes * cluster.ranks_per_node
    if cluster.device == "cuda" and host > cluster.host_memory_bytes:
        raise DoesNotFitError(
            f"{subject}: needs {format_bytes(host)} of host memory per node; "
            f"a node has {format_bytes(cluster.host_memory_bytes)}: take more nodes or other offload"
        )
