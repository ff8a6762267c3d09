"""One of four ranks that share out relations, in groups of 4, and of 2 with 2 replicas: python relation_ranks.py OUT.

Each rank runs every case with its own samples, and in one process with those of its group. Rank r writes OUT/r.json:
for each case the largest differences, relative to the largest value, and the bytes sent at the collectives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from translution.distributed import leave_process_group
from translution.models import AlphaTranslution, Translution, build
from translution.models.relation_parallel import (
    average_table_gradients,
    clip_gradients,
    exclude_tables,
    gather_state_dict,
    load_whole_state_dict,
    share_dropout,
    split_world,
)
from translution.planner.common import InputError
from translution.planner.config import parse_model_spec

DIM, HEADS, BATCH = 6, 2, 3
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "full": (Translution, {"grid": (3, 4)}),
    "full, class token, window": (Translution, {"grid": (3, 4), "class_token": True, "window": 1}),
    "full, causal": (Translution, {"length": 7, "causal": True}),
    "full, causal video, class token": (Translution, {"grid": (2, 2, 2), "class_token": True, "causal": True}),
    "full, dropout": (Translution, {"grid": (2, 3), "class_token": True, "dropout": 0.3}),
    "full, padding": (Translution, {"length": 7, "padding": True}),
    "full, batched": (Translution, {"grid": (2, 3), "class_token": True, "implementation": "batched"}),
    "full, checkpointing": (Translution, {"length": 7, "dropout": 0.3, "checkpointing": True}),
    "full, one tile, given owners": (Translution, {"length": 5, "tile_relations": None, "owners": True}),
    "full, autocast": (Translution, {"grid": (2, 3), "class_token": True, "autocast": True}),
    "full, rows without gradient": (Translution, {"length": 5, "fixed_rows": True}),
    **{
        f"full, {roles}": (Translution, {"grid": (2, 3), "roles": roles}) for roles in ("kv", "qv", "qk", "q", "k", "v")
    },
    "alpha": (AlphaTranslution, {"grid": (2, 3), "class_token": True, "c1": 2, "c2": 3}),
    "alpha, causal, rotary, dropout": (
        AlphaTranslution,
        {"length": 7, "causal": True, "c1": 3, "c2": 1, "rotary": True, "head_dim": 4, "dropout": 0.3},
    ),
    "alpha, window, padding": (AlphaTranslution, {"length": 7, "window": 2, "c1": 2, "c2": 2, "padding": True}),
    **{
        f"alpha, {roles}": (AlphaTranslution, {"grid": (2, 3), "c1": 2, "c2": 3, "roles": roles})
        for roles in ("k", "v")
    },
}
NETWORK = {"family": "vit", "image": 8, "patch": 4, "channels": 1, "classes": 5, "dim": 8, "depth": 2, "heads": 2}


class SentBytes:
    """Counts the bytes that this rank sends to others, at torch's collectives."""

    def __init__(self) -> None:
        self.total = 0
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.gather, self.exchange = getattr(dist, name), dist.all_to_all_single
        setattr(dist, name, self._gather)
        dist.all_to_all_single = self._exchange

    def _gather(self, out: Tensor, own: Tensor, group: Any = None) -> Any:
        self.total += (dist.get_world_size(group) - 1) * own.nbytes
        return self.gather(out, own, group=group)

    def _exchange(self, out: Tensor, sent: Tensor, *sizes: Any, group: Any = None) -> Any:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        kept = sizes[1][rank] if len(sizes) == 2 else len(sent) // ranks
        self.total += sent.nbytes - kept * (sent.nbytes // len(sent))
        return self.exchange(out, sent, *sizes, group=group)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; infinite for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-30))


def run(
    layer: nn.Module, x: Tensor, grad: Tensor, mask: Tensor | None, seed: int, *, recompute: bool, narrow: bool
) -> list[Tensor]:
    """Return the output and the gradient of the rows; gradients of weights are in the layer."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        out = checkpoint(layer, x, mask, use_reentrant=False) if recompute else layer(x, mask)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *([] if x.grad is None else [x.grad])]


def layer_case(group: Any, kind: type[Any], options: dict[str, Any], counter: SentBytes) -> dict[str, Any]:
    options = {"tile_relations": 3} | options
    padding = options.pop("padding", False)
    owners, fixed = options.pop("owners", False), options.pop("fixed_rows", False)
    how = {"recompute": options.pop("checkpointing", False), "narrow": options.pop("autocast", False)}
    # Autocast leaves float64 alone.
    torch.set_default_dtype(torch.float32 if how["narrow"] else torch.float64)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(1)
    whole = kind(DIM, HEADS, **options)
    owned = {"relation_owners": [r % ranks for r in reversed(range(whole.geometry.relations))]} if owners else {}
    torch.manual_seed(1)
    layer = kind(DIM, HEADS, **options, relation_group=group, **owned)
    state = gather_state_dict(layer)
    found = {"initial values": 0.0}
    if rank == 0:
        found["initial values"] = max(difference(state[name], value) for name, value in whole.state_dict().items())
    nn.init.normal_(whole.tables.logit_tiles[0].query, std=0.5) if "q" in whole.roles else None
    load_whole_state_dict(layer, whole.state_dict())
    tokens = whole.geometry.tokens
    x, grad = torch.randn(ranks * BATCH, tokens, DIM), torch.randn(ranks * BATCH, tokens, DIM)
    mask = None
    if padding:
        mask = torch.rand(len(x), tokens) < 0.3
    theirs = run(whole, x.clone().requires_grad_(not fixed), grad, mask, 100, **how)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    counter.total = 0
    own_rows = x[mine].clone().requires_grad_(not fixed)
    # Another seed on every rank but the first: dropout follows the first one's.
    ours = run(layer, own_rows, grad[mine], None if mask is None else mask[mine], 100 + rank, **how)
    sent = counter.total
    found |= {f"result {n}": difference(a, b[mine]) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))}
    found["copy"] = difference(deepcopy(layer).eval()(x[mine]), layer.eval()(x[mine]))
    found |= weight_differences(group, layer, whole)
    return {"differences": found, "sent": sent}


def weight_differences(group: Any, layer: nn.Module, whole: nn.Module) -> dict[str, float]:
    """Compare the gradients of weights: tables as they are, the others summed over the group."""
    theirs = {name: parameter.grad for name, parameter in whole.named_parameters()}
    owned = {id(x) for x in layer.tables.parameters()}
    for parameter in layer.parameters():
        if id(parameter) not in owned:
            dist.all_reduce(parameter.grad, group=group)
    with torch.no_grad():  # The gradients take the values' places, so that they are gathered as a state dict is.
        for parameter in layer.parameters():
            parameter.copy_(parameter.grad)
    gathered = gather_state_dict(layer)
    return (
        {f"gradient of {name}": difference(gathered[name], grad) for name, grad in theirs.items()} if gathered else {}
    )


def network_case(group: Any, replicas: Any, world: Any) -> dict[str, Any]:
    """Train a network for three steps in a plain loop, and in one process with the samples of all ranks of a world."""
    spec = parse_model_spec(NETWORK)
    torch.manual_seed(2)
    whole = build(spec)
    torch.manual_seed(2)
    network = build(spec, relation_group=group)
    model = DistributedDataParallel(exclude_tables(network), process_group=world)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.5, momentum=0.9) for x in (whole, model)]
    rank, ranks = dist.get_rank(world), dist.get_world_size(world)
    found: dict[str, float] = {}
    for step in range(3):
        images, labels = torch.randn(ranks * BATCH, 1, 8, 8), torch.randint(5, (ranks * BATCH,))
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images), labels).backward()
        mine = slice(rank * BATCH, (rank + 1) * BATCH)
        for half in (slice(0, 2), slice(2, 3)):  # Accumulation: two samples, then one.
            outputs = model(images[mine][half])
            loss = nn.functional.cross_entropy(outputs, labels[mine][half], reduction="sum") / BATCH
            loss.backward()
        average_table_gradients(model, replicas)
        norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        found[f"norm {step}"] = difference(clip_gradients(model, 0.5), norm)
        for optimizer in optimizers:
            optimizer.step()
    state = gather_state_dict(network)
    found |= {name: difference(state[name], value) for name, value in whole.state_dict().items()} if state else {}
    return {"differences": found}


def dropout_case(group: Any, world: Any) -> dict[str, Any]:
    """Let groups drop what one process with the samples of all ranks of a world does."""
    torch.manual_seed(3)
    whole = Translution(DIM, HEADS, length=5, dropout=0.3)
    torch.manual_seed(3)
    layer = share_dropout(Translution(DIM, HEADS, length=5, dropout=0.3, relation_group=group))
    rank, samples = dist.get_rank(world), dist.get_world_size(world) * BATCH
    x, grad = torch.randn(samples, 5, DIM), torch.randn(samples, 5, DIM)
    mine, how = slice(rank * BATCH, (rank + 1) * BATCH), {"recompute": False, "narrow": False}
    theirs = run(whole, x.clone().requires_grad_(), grad, None, 100, **how)
    ours = run(layer, x[mine].clone().requires_grad_(), grad[mine], None, 100 + rank, **how)
    return {"differences": {str(n): difference(a, b[mine]) for n, (a, b) in enumerate(zip(ours, theirs, strict=True))}}


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return "no error"


def errors(group: Any) -> dict[str, str]:
    """Return the text of the error of each wrong call."""
    layer = Translution(DIM, HEADS, length=5, relation_group=group)
    x = torch.randn(2, 5, DIM)
    make = partial(Translution, DIM, HEADS, length=3)
    vmapped = torch.vmap(lambda rows: layer(rows.unsqueeze(0)))
    return {
        "does not divide": message(lambda: split_world(3)),
        "exceeds the relations": message(lambda: Translution(DIM, HEADS, length=2, relation_group=group)),
        "owner": message(lambda: make(relation_group=group, relation_owners=[0, 1, 2, 3, 4])),
        "owns nothing": message(lambda: make(relation_group=group, relation_owners=[0] * 5)),
        "length": message(lambda: make(relation_group=group, relation_owners=[0])),
        "no group": message(lambda: make(relation_owners=[0] * 5)),
        "naive": message(lambda: make(relation_group=group, implementation="naive")),
        "vmap": message(lambda: vmapped(x)),
        "table": message(lambda: layer.tables.table("query")),
        "state": message(lambda: load_whole_state_dict(layer, layer.state_dict())),
    }


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # Memory without values reads as NaN.
    counter = SentBytes()
    results: dict[str, Any] = {}
    for relation_ranks in (4, 2):
        group, replicas = split_world(relation_ranks)
        for name, (kind, options) in CASES.items():
            results[f"{relation_ranks} ranks: {name}"] = layer_case(group, kind, dict(options), counter)
        results[f"{relation_ranks} ranks: network"] = network_case(group, None, group)
    results["2 x 2 ranks: network"] = network_case(group, replicas, dist.group.WORLD)
    results["2 x 2 ranks: dropout"] = dropout_case(group, dist.group.WORLD)
    results["errors"] = errors(dist.group.WORLD)
    results["text"] = str(Translution(DIM, HEADS, length=5, relation_group=dist.group.WORLD).tables).splitlines()[1]
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
