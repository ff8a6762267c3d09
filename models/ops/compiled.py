"""The operator with relation tables as one custom operator of torch, so that `torch.compile` sees a call, not a break.

Forward runs the chain of grouped.py without autograd; backward, a second custom operator, runs the chain's backward
functions in reverse. What is saved is what the chain saves: the inputs, the tables and the attention weights.

All tiles are arguments of one call, so a layer whose tiles ZeRO-3 gathers one after the other cannot use it.

To import this module registers the operators.

Legend of shapes: b batch, n tokens, h heads, k relations of a tile, c input width, e output width.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry

from . import grouped
from .context import RelationContext
from .implementations import choose_implementation


def describe_operator(
    geometry: RelationGeometry,
    heads: int,
    scale: float,
    widths: tuple[int, int],
    tiles: Sequence[tuple[int, Sequence[str]]],
) -> str:
    """Return what all calls of a layer have in common, as JSON: a custom operator takes numbers, text and tensors only.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        scale: factor applied to the summed logits.
        widths: input and output width of the matrices.
        tiles: first relation of each tile, and the roles of its tables; tiles of logits, then those of values.
    """
    parts = (geometry.axes, geometry.class_token, geometry.causal, geometry.window, geometry.is_sequence)
    return json.dumps([parts, heads, scale, widths, [[first, list(roles)] for first, roles in tiles]])


def _read(operator: str, options: str) -> dict[str, Any]:
    """Return the call's parts by name.

    Args:
        operator: of `describe_operator`.
        options: implementation, whether it must be deterministic (True, False or None), bytes of scratch memory,
            dropout and names of the sources in the order of `grouped.SOURCES`, with spaces between them: torch's
            compiler can follow ``str.join``.
    """
    geometry, heads, scale, widths, tiles = json.loads(operator)
    implementation, deterministic, workspace_bytes, dropout, *names = options.split()
    return {
        "geometry": geometry,
        "heads": heads,
        "scale": scale,
        "widths": tuple(widths),
        "tiles": tiles,
        "implementation": implementation,
        "deterministic": {"True": True, "False": False, "None": None}[deterministic],
        "workspace_bytes": int(workspace_bytes),
        "dropout": float(dropout),
        "names": names,
    }


def _context(call: dict[str, Any], first: Tensor, key_padding: Tensor | None, seed: Tensor) -> RelationContext:
    axes, class_token, causal, window, is_sequence = call["geometry"]
    window = tuple(window) if isinstance(window, list) else window
    geometry = RelationGeometry(tuple(axes), class_token, causal, window, is_sequence)
    context = RelationContext(geometry, call["heads"], call["scale"], call["workspace_bytes"])
    context.widths = call["widths"]
    context.relative = frozenset(role for _, roles in call["tiles"] for role in roles)
    context.adds_logits = "plain_query" in call["names"]
    context.key_padding, context.dropout = key_padding, call["dropout"]
    context.seed = int(seed) if context.dropout else 0
    context.implementation = choose_implementation(
        call["implementation"], first.device, first.dtype, context.widths, context.heads
    )
    deterministic = call["deterministic"]
    context.deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    return context


def _tiles(call: dict[str, Any], tables: Sequence[Tensor]) -> list[tuple[int, dict[str, Tensor]]]:
    """Return the first relation and the matrices by role of each tile."""
    rest = iter(tables)
    return [(first, {role: next(rest) for role in roles}) for first, roles in call["tiles"]]


def _ordered(call: dict[str, Any], sources: Sequence[Tensor]) -> list[Tensor | None]:
    given = dict(zip(call["names"], sources, strict=True))
    return [given[name].contiguous() if name in given else None for name in grouped.SOURCES]


@torch.library.custom_op("translution::attend", mutates_args=())
def attend(
    sources: list[Tensor], tables: list[Tensor], key_padding: Tensor | None, seed: Tensor, operator: str, options: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with relation tables.

    Args:
        sources: inputs by their names in the options, (b, n, width) each.
        tables: matrices of the tiles, (k, c, e) each.
        key_padding: (b, n), true where a token is padding.
        seed: seed of dropout, an int64 scalar on the CPU.
        operator, options: as in `_read`.

    Returns:
        Outputs of the relative values and of the plain values, (b, n, width) each or without elements, and the
        attention weights before dropout, (b, h, n, n).
    """
    with _without_autocast(sources[0]):
        return _attend(sources, tables, key_padding, seed, _read(operator, options))


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else contextlib.nullcontext()


def _attend(
    sources: list[Tensor], tables: list[Tensor], key_padding: Tensor | None, seed: Tensor, read: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    context, first = _context(read, sources[0], key_padding, seed), sources[0]
    link = grouped.OpenFunction.apply(context, first.new_zeros(1), *_ordered(read, sources))
    tiles = _tiles(read, tables)
    for begin, tile in tiles:
        if "value" not in tile:
            link = grouped.LogitTileFunction.apply(link, context, begin, tile.get("query"), tile.get("key"))
    link = grouped.SoftmaxFunction.apply(link, context, first.dtype)
    attention = context.attention
    assert attention is not None
    for begin, tile in tiles:
        if "value" in tile:
            link = grouped.ValueTileFunction.apply(link, context, begin, tile["value"])
    relative, plain = grouped.CloseFunction.apply(link, context, first.dtype)
    empty = first.new_empty(0)
    return (empty if relative is None else relative, empty.clone() if plain is None else plain, attention)


@attend.register_fake
def _(
    sources: list[Tensor], tables: list[Tensor], key_padding: Tensor | None, seed: Tensor, operator: str, options: str
) -> tuple[Tensor, Tensor, Tensor]:
    read, first = _read(operator, options), sources[0]
    given = dict(zip(read["names"], sources, strict=True))
    batch, tokens = first.shape[:2]
    relative = first.new_empty((batch, tokens, read["widths"][1]) if "value" in given else 0)
    plain = torch.empty_like(given["plain_value"]) if "plain_value" in given else first.new_empty(0)
    return relative, plain, first.new_empty(batch, read["heads"], tokens, tokens)


@torch.library.custom_op("translution::attend_backward", mutates_args=())
def attend_backward(
    sources: list[Tensor],
    tables: list[Tensor],
    key_padding: Tensor | None,
    seed: Tensor,
    operator: str,
    options: str,
    attention: Tensor,
    grad_relative: Tensor | None,
    grad_plain: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of sources and tables, in this order; without elements where ``wanted`` is false.

    Args:
        sources, tables, key_padding, seed, operator, options: as in `attend`.
        attention: attention weights before dropout, (b, h, n, n).
        grad_relative: gradient of the output of the relative values; None if there is none.
        grad_plain: gradient of the output of the plain values; None if there is none.
        wanted: which sources and tables require a gradient.
    """
    call = _read(operator, options)
    with _without_autocast(attention):
        grads = _gradients(sources, tables, key_padding, seed, call, attention, (grad_relative, grad_plain), wanted)
    # A source has no gradient if only the other output has one.
    return [
        attention.new_empty(0) if not need else torch.zeros_like(x) if grad is None else grad.contiguous()
        for grad, x, need in zip(grads, (*sources, *tables), wanted, strict=True)
    ]


def _gradients(
    sources: list[Tensor],
    tables: list[Tensor],
    key_padding: Tensor | None,
    seed: Tensor,
    read: dict[str, Any],
    attention: Tensor,
    grad_outputs: tuple[Tensor | None, Tensor | None],
    wanted: list[bool],
) -> list[Tensor | None]:
    """Run the chain's backward functions; return the gradients of sources and tables."""
    context, names = _context(read, sources[0], key_padding, seed), read["names"]
    context.wanted = frozenset(name for name, need in zip(names, wanted, strict=False) if need)
    needs = iter(wanted[len(names) :])
    tiles = [(first, tile, {role: next(needs) for role in tile}) for first, tile in _tiles(read, tables)]
    link = attention.new_zeros(1)
    saved = SimpleNamespace(context=context, names=names, has_relative="value" in names)
    saved.saved_tensors = (attention, *sources)
    grouped.CloseFunction.backward(saved, *grad_outputs)
    grads: dict[int, list[Tensor | None]] = {}
    for number, (first, tile, need) in reversed(list(enumerate(tiles))):
        if "value" in tile:
            own = SimpleNamespace(context=context, first=first, value=tile["value"])
            own.needs_input_grad = (True, False, False, need["value"])
            grads[number] = [grouped.ValueTileFunction.backward(own, link)[3]]
    grouped.SoftmaxFunction.backward(SimpleNamespace(context=context), link)
    for number, (first, tile, need) in reversed(list(enumerate(tiles))):
        if "value" not in tile:
            own = SimpleNamespace(context=context, first=first, query=tile.get("query"), key=tile.get("key"))
            own.count = len(next(iter(tile.values())))
            own.needs_input_grad = (True, False, False, need.get("query", False), need.get("key", False))
            found = dict(zip(("query", "key"), grouped.LogitTileFunction.backward(own, link)[3:], strict=True))
            grads[number] = [found[role] for role in tile]
    by_name = dict(
        zip(grouped.SOURCES, grouped.OpenFunction.backward(SimpleNamespace(context=context), link)[2:], strict=True)
    )
    return [by_name[name] for name in names] + [grad for number in sorted(grads) for grad in grads[number]]


@attend_backward.register_fake
def _(
    sources: list[Tensor],
    tables: list[Tensor],
    key_padding: Tensor | None,
    seed: Tensor,
    operator: str,
    options: str,
    attention: Tensor,
    grad_relative: Tensor | None,
    grad_plain: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    inputs = zip((*sources, *tables), wanted, strict=True)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else attention.new_empty(0)
        for x, need in inputs
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    sources, tables, key_padding, seed, *ctx.call = inputs
    ctx.counts, ctx.padded = (len(sources), len(tables)), key_padding is not None
    ctx.wanted = [x.requires_grad for x in (*sources, *tables)]
    ctx.has_relative, ctx.has_plain = (x.numel() > 0 for x in output[:2])
    ctx.save_for_backward(output[2], seed, *sources, *tables, *([key_padding] if ctx.padded else []))


def _backward(ctx: Any, grad_relative: Tensor, grad_plain: Tensor, _: Tensor) -> tuple[Any, ...]:
    attention, seed, *rest = ctx.saved_tensors
    count, end = ctx.counts[0], sum(ctx.counts)
    grads = attend_backward(
        rest[:count], rest[count:end], rest[end] if ctx.padded else None, seed, *ctx.call, attention,
        grad_relative if ctx.has_relative else None, grad_plain if ctx.has_plain else None, ctx.wanted,
    )  # fmt: skip
    given = [grad if need else None for grad, need in zip(grads, ctx.wanted, strict=True)]
    return given[:count], given[count:], None, None, None, None


attend.register_autograd(_backward, setup_context=_setup)
