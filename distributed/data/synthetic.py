"""Random samples with a model's input shape, for measurements."""

from __future__ import annotations

import torch

from translution.planner.config import GptSpec, ModelSpec, PatchSpec

from .base import Samples

_SYNTHETIC_SAMPLES = 4096


def make_synthetic(spec: ModelSpec, seed: int, global_batch: int = 1) -> tuple[Samples, Samples]:
    """Return random training and held-out samples for load tests; there is nothing to learn from them.

    Args:
        spec: the model; it gives the input shape.
        seed: seed of the random values.
        global_batch: samples per step; at least this many training samples are returned.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(_SYNTHETIC_SAMPLES, 2 * global_batch)
    if isinstance(spec, PatchSpec):
        # One image or clip, expanded to `count` views: the memory of a load test belongs to the model.
        inputs = torch.randn(1, *spec.sample_shape, generator=generator).expand(count, *spec.sample_shape)
        samples = Samples(inputs, torch.randint(spec.classes, (count,), generator=generator))
    else:
        assert isinstance(spec, GptSpec)
        text = torch.randint(spec.vocabulary, (count + spec.context,), generator=generator)
        windows = text.unfold(0, spec.context + 1, 1)
        samples = Samples(windows[:, :-1], windows[:, 1:])
    cut = count - _SYNTHETIC_SAMPLES // 4
    return Samples(samples.inputs[:cut], samples.targets[:cut]), Samples(samples.inputs[cut:], samples.targets[cut:])
