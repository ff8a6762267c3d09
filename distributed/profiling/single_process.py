"""Memory of one forward and backward pass on one process, without DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from translution.models import build
from translution.planner.common import Phase
from translution.planner.config import LossKind, ModelSpec, PatchSpec

from .allocation_tracer import trace_allocations


def random_samples(spec: ModelSpec, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random inputs and targets of a micro-batch."""
    if isinstance(spec, PatchSpec):
        return torch.randn(batch, *spec.sample_shape).to(dtype), torch.randint(spec.classes, (batch,))
    return torch.randint(spec.vocabulary, (batch, spec.context)), torch.randint(spec.vocabulary, (batch, spec.context))


def measure_passes(
    spec: ModelSpec,
    batch: int,
    dtype: torch.dtype,
    tile_relations: int | None = None,
    implementation: str = "grouped",
    autocast: torch.dtype | None = None,
    *,
    loss: LossKind = "whole",
    relation_group: ProcessGroup | None = None,
) -> dict[str, int]:
    """Peak bytes allocated in forward and in backward, without the parameters and the samples.

    torch's CPU kernels allocate blocks per thread, so set the number of threads before. Call `count_every_allocation`
    before the first tensor.

    Args:
        spec: the model.
        batch: number of samples.
        dtype: of parameters and activations.
        tile_relations: relations per tile; None leaves the tables untiled.
        implementation: of the relative operators, as `build` takes it.
        autocast: dtype of autocast around the network, without the loss, as in DeepSpeed's engine; None disables it.
        loss: how the loss is computed; of mixed images from random class probabilities.
        relation_group: ranks that share out the relations and measure the same; None for one process.
    """
    torch.manual_seed(0)
    network = build(
        spec, tile_relations=tile_relations, implementation=implementation, relation_group=relation_group
    ).to(dtype)
    inputs, targets = random_samples(spec, batch, dtype)
    losses: list[Tensor] = []
    if loss in ("mixed", "smoothed"):
        assert isinstance(spec, PatchSpec)
        targets = torch.rand(batch, spec.classes).softmax(-1)

    def forward() -> None:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            if loss == "chunked":
                losses.append(network(inputs, targets))
                return
            logits = network(inputs)
        wanted = targets if targets.is_floating_point() else targets.flatten()
        smoothing = 0.1 if loss == "smoothed" else 0.0
        logits = logits.flatten(0, -2).float()
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=smoothing))

    def backward() -> None:
        losses[0].backward()

    forward()
    backward()  # After this, everything that torch allocates once is allocated.
    losses.clear()
    network.zero_grad(set_to_none=True)
    begin, highest = trace_allocations(forward)
    return {Phase.FORWARD: highest - begin, Phase.BACKWARD: trace_allocations(backward)[1] - begin}
