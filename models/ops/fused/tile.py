"""The products of one tile through the fused kernels: rows of queries, keys and values do not leave the chip.

Only backward of the logits writes projected rows, the gradients of queries and keys, for a chunk of relations at a
time: few enough to stay in the L2 cache of a GPU, and within ``workspace_bytes``.

Sums over the pairs of a token are atomic additions, whose order changes from run to run. In deterministic mode one
relation runs after the other: in a relation between patches no token has two pairs. Those with the class token are then
left to grouped.py, and so are relations that are too large for the scratch memory.

Legend of shape suffixes: b batch, n tokens, c input width, e inner width, h heads, k relations of a tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..context import RelationContext, accumulation_dtype
from ..pair_index import sorted_pairs
from .blocks import RelationChunk, pair_lists, relation_chunks, row_blocks
from .configs import KernelConfig, candidates, choose_config, fitted, heads_and_columns


def launch_kernel(
    kernel: str,
    programs: int,
    arguments: Sequence[Any],
    constants: dict[str, Any],
    config: KernelConfig,
    *,
    only_compile: bool = False,
) -> None:
    """Run a kernel of kernels.py or gradient_kernels.py.

    Args:
        kernel: its name.
        programs: number of programs.
        arguments: tensors and integers, in the kernel's order.
        constants: values that the kernel is compiled for, by name.
        config: number of warps and of stages.
        only_compile: compile it and do not run it.
    """
    from . import gradient_kernels, kernels

    module = kernels if hasattr(kernels, kernel) else gradient_kernels
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        function = getattr(module, kernel)
        run = partial(function.warmup, grid=(programs,)) if only_compile else function[(programs,)]
        run(*arguments, **constants, **config.options)


def product_precision(device: torch.device) -> str:
    """Return the precision of products: of fp32 "tf32" if torch allows it, else "ieee"; "upcast" in the interpreter."""
    if device.type != "cuda":
        return "upcast"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


@lru_cache(maxsize=64)
def _side_stream(device: torch.device, stream: int, number: int) -> torch.cuda.Stream:
    """Return one of the streams for work at the same time as that of a stream."""
    return torch.cuda.Stream(device)


class FusedTile:
    """The products of one tile, with the kernels of kernels.py.

    Args:
        context: state of the call.
        first: first relation of the tile.
        count: number of relations in the tile.
        tune: whether to time the configurations of each kernel at its first call.
    """

    def __init__(self, context: RelationContext, first: int, count: int, *, tune: bool = True) -> None:
        self.context, self.first, self.tune = context, first, tune
        like = next(iter(context.source.values()))
        self.batch, self.dtype, self.device = len(like), like.dtype, like.device
        self.d_in, d_out = context.widths
        self.d_out, self.head_dim = d_out, d_out // context.heads
        self.all = tuple(range(first, first + count))
        self.leftover: tuple[int, ...] = ()
        """Relations that the last call left to grouped.py."""

    def add_logits(self, query_kce: Tensor | None, key_kce: Tensor | None) -> None:
        """Write the logits of the tile's pairs into the context, or add them.

        Args:
            query_kce: query matrices of the tile; None for a plain role.
            key_kce: key matrices of the tile; None for a plain role.
        """
        logits, source = self.context.logits, self.context.source
        assert logits is not None
        self._pair_products(
            logits, (source["query"], query_kce), (source["key"], key_kce), add=self.context.adds_logits
        )

    def logits_backward(self, tiles: dict[str, Tensor | None], grads: dict[str, Tensor | None]) -> None:
        """Compute the gradients of the tile's matrices and add to those of the queries and keys.

        Args:
            tiles: matrices (k, c, e) of "query" and "key"; None for a plain role.
            grads: gradients of the matrices, written in place; None where not required.
        """
        context = self.context
        wanted = [name for name in ("query", "key") if grads[name] is not None or name in context.wanted]
        if not wanted:
            return
        assert context.grad_attention is not None
        chunks, large = self._chunks(self._set_leftover(), len(wanted))
        self.leftover += large
        sides = {name: (context.source[name], tiles[name]) for name in ("query", "key")}
        for chunk in chunks:
            rows = self._projected_gradients(chunk, context.grad_attention, sides["query"], sides["key"], wanted)
            self._together(
                *(partial(self._input_backward, chunk, name, rows[name], tiles[name], grads[name]) for name in wanted)
            )

    def add_values(self, value_kce: Tensor) -> None:
        """Add the output of the tile's pairs to the context, from value matrices (k, c, e)."""
        context = self.context
        assert context.out is not None
        self._run(
            "values_kernel",
            self._set_leftover(),
            (context.out,),
            (context.source["value"], value_kce.contiguous(), context.weights),
            {"ATOMIC": not context.deterministic},
            per_block=lambda groups, _: groups,
            adds=True,
        )

    def values_backward(self, value_kce: Tensor, grad_kce: Tensor | None) -> None:
        """Add to the gradients of the attention weights and values; compute those of the matrices.

        Args:
            value_kce: value matrices of the tile.
            grad_kce: gradients of the matrices, written in place; None where not required.
        """
        context = self.context
        assert context.grad_attention is not None and context.grad_out is not None and context.weights is not None
        relations = self._set_leftover()
        chunks, large = self._chunks(relations, 1)
        self.leftover += large
        wanted = grad_kce is not None or "value" in context.wanted
        self._pair_products(
            context.grad_attention,
            (context.grad_out, None),
            (context.source["value"], value_kce),
            tuple(relation for relation in relations if relation not in large),
            add=True,
        )
        for chunk in chunks if wanted else ():
            # The gradient of a projected value is that of the output at the query, times the weight.
            rows = self._projected_gradients(
                chunk, context.weights, (context.grad_out, None), (context.grad_out, None), ("key",)
            )
            self._input_backward(chunk, "value", rows["key"], value_kce, grad_kce)

    def _together(self, *work: Callable[[], None]) -> None:
        """Do independent pieces of work, on a GPU at the same time: the last blocks of one leave room for another."""
        if self.device.type != "cuda" or len(work) < 2:
            for piece in work:
                piece()
            return
        current = torch.cuda.current_stream(self.device)
        used = [_side_stream(self.device, current.cuda_stream, number) for number in range(len(work) - 1)]
        for stream in used:
            stream.wait_stream(current)
        for stream, piece in zip((*used, current), work, strict=True):
            with torch.cuda.stream(stream):
                piece()
        for stream in used:
            current.wait_stream(stream)

    def _chunks(self, relations: tuple[int, ...], roles: int) -> tuple[tuple[RelationChunk, ...], tuple[int, ...]]:
        """Cut relations into chunks whose rows fit in the scratch memory; also return those that do not fit."""
        pair_bytes = roles * self.d_out * self.dtype.itemsize * self.batch
        limit = self.context.workspace_bytes * 3 // 4
        return relation_chunks(self.context.geometry, relations, limit // pair_bytes)

    def _set_leftover(self) -> tuple[int, ...]:
        """Leave the relations with the class token to grouped.py in deterministic mode; return the others."""
        if not self.context.deterministic:
            return self.all
        offsets = self.context.geometry.offsets
        self.leftover = tuple(relation for relation in self.all if relation >= offsets)
        return tuple(relation for relation in self.all if relation < offsets)

    def _pair_products(
        self,
        target_bhnn: Tensor,
        query: tuple[Tensor, Tensor | None],
        key: tuple[Tensor, Tensor | None],
        relations: tuple[int, ...] | None = None,
        *,
        add: bool,
    ) -> None:
        """Write or add Σ_d q·k of each pair, from rows and matrices of queries and keys; None for rows as they are."""
        self._run(
            "logits_kernel",
            self.all if relations is None else relations,
            (target_bhnn,),
            (query[0], key[0], _table(query[1], query[0]), _table(key[1], key[0])),
            {"QUERY_TABLE": query[1] is not None, "KEY_TABLE": key[1] is not None, "ADD": add},
            per_block=lambda groups, _: groups,
            adds=add,
        )

    def _projected_gradients(
        self,
        chunk: RelationChunk,
        factors_bhnn: Tensor,
        query: tuple[Tensor, Tensor | None],
        key: tuple[Tensor, Tensor | None],
        wanted: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the factors times the rows of the chunk's pairs, (pairs·b, e) each.

        Args:
            chunk: the relations.
            factors_bhnn: factor of each pair and head.
            query: rows and matrices of the queries, whose products are the rows "key"; None for rows as they are.
            key: rows and matrices of the keys, whose products are the rows "query".
            wanted: names of the rows to compute.
        """
        like = query[0]
        rows = {name: like.new_empty(chunk.pairs * self.batch, self.d_out) for name in wanted}
        self._run(
            "projected_gradients_kernel",
            chunk.relations,
            tuple(rows.get(name, like) for name in ("query", "key")),
            (factors_bhnn, query[0], key[0], _table(query[1], query[0]), _table(key[1], key[0])),
            {
                **{"QUERY_TABLE": query[1] is not None, "KEY_TABLE": key[1] is not None},
                **{f"{name.upper()}_GRADS": name in wanted for name in ("query", "key")},
            },
            first_row=chunk.first_pair * self.batch,
            per_block=lambda groups, _: groups,
        )
        return rows

    def _input_backward(
        self, chunk: RelationChunk, name: str, rows: Tensor, tile_kce: Tensor | None, grad_kce: Tensor | None
    ) -> None:
        """Compute the gradients of a role's matrices and add to that of its input.

        Args:
            chunk: the relations.
            name: the role's input.
            rows: gradients of the projected rows of the chunk.
            tile_kce: matrices of the role; None for a plain role.
            grad_kce: gradient of the matrices, written in place; None where not required.
        """
        context, source = self.context, self.context.source[name]
        first_row, by_query = chunk.first_pair * self.batch, {"BY_QUERY": name == "query"}
        work: list[Callable[[], None]] = []
        if tile_kce is not None and grad_kce is not None:
            work.append(
                partial(
                    self._run,
                    "matrix_gradients_kernel",
                    chunk.relations,
                    (grad_kce,),
                    (source, rows),
                    by_query,
                    first_row=first_row,
                    per_block=lambda groups, blocks: groups * blocks,
                    whole=True,
                )
            )
        if name in context.wanted:
            if name not in context.grads:
                context.grads[name] = torch.zeros_like(source, dtype=accumulation_dtype(source.dtype))
            plain = tile_kce is None
            work.append(
                partial(
                    self._run,
                    "plain_gradients_kernel" if plain else "input_gradients_kernel",
                    chunk.relations,
                    (context.grads[name],),
                    (rows,) if tile_kce is None else (tile_kce.contiguous(), rows),
                    by_query | {"ATOMIC": not context.deterministic},
                    first_row=first_row,
                    per_block=(lambda groups, _: groups) if plain else (lambda _, blocks: blocks),
                    adds=True,
                )
            )
        self._together(*work)

    def _run(
        self,
        kernel: str,
        relations: tuple[int, ...],
        written: tuple[Tensor, ...],
        read: Sequence[Tensor | None],
        constants: dict[str, Any],
        *,
        per_block: Callable[[int, int], int],
        first_row: int | None = None,
        adds: bool = False,
        whole: bool = False,
    ) -> None:
        """Run a kernel over the rows of relations, with the fastest of its configurations.

        Args:
            kernel: name of the kernel.
            relations: relations whose rows are read.
            written: tensors that the kernel writes.
            read: tensors that it reads, in the kernel's order.
            constants: the kernel's own constants.
            per_block: number of programs of a block of rows, given the number of groups of heads and the number of
                blocks of columns of the input width.
            first_row: the kernel's argument of this name; None if it has none.
            adds: whether the kernel adds to what it writes.
            whole: whether a program takes all rows of a relation.
        """
        if not relations:
            return
        context = self.context
        lists = pair_lists(context.geometry, self.device)
        numbers = (
            (self.batch, context.geometry.tokens)
            if first_row is None
            else (first_row, self.batch, context.geometry.tokens)
        )
        separate = constants.get("ATOMIC") is False

        def run(config: KernelConfig, targets: tuple[Tensor, ...], *, only_compile: bool = False) -> None:
            heads, width = heads_and_columns(context.heads, self.head_dim, config.columns)
            config = fitted(config, self.dtype.itemsize, width)
            groups, c_blocks = -(-context.heads // heads), -(-self.d_in // config.inner)
            given = constants | {"HEADS": context.heads, "D": self.head_dim, "HP": heads, "DP": width}
            given["BLOCK_M"] = config.rows
            if kernel != "plain_gradients_kernel":
                given |= {"C": self.d_in, "BLOCK_C": config.inner, "PRECISION": product_precision(self.device)}
            blocks = row_blocks(
                context.geometry,
                self.first,
                relations,
                self.batch,
                None if whole else config.rows,
                separate,
                self.device,
            )
            for start, count in blocks.bounds:
                arguments = (*targets, *read, blocks.entries, lists.query, lists.key, start, *numbers)
                programs = count * per_block(groups, c_blocks)
                launch_kernel(kernel, programs, arguments, given, config, only_compile=only_compile)
                if only_compile:
                    return

        offered = candidates(kernel, self.dtype, product_precision(self.device))
        timed = self.tune and not context.deterministic
        dtypes = tuple(x.dtype for x in read if x is not None)
        widths = (self.d_in, self.d_out, context.heads)
        key = (kernel, tuple(sorted(constants.items())), dtypes, self.device, widths, self._size(relations))
        copies: list[Tensor] = []

        def trial(config: KernelConfig, *, only_compile: bool = False) -> None:
            if adds and not copies and not only_compile:
                copies.extend(x.clone() for x in written)
            run(config, tuple(copies) or written, only_compile=only_compile)

        run(choose_config(key, offered, trial, timed=timed), written)

    def _size(self, relations: tuple[int, ...]) -> int:
        """Return a class of the mean number of rows of a relation: those of a class differ by less than 8 times."""
        _, starts = sorted_pairs(self.context.geometry)
        pairs = starts[relations[-1] + 1] - starts[relations[0]]
        return (pairs * self.batch // len(relations)).bit_length() // 3


def _table(tile_kce: Tensor | None, rows: Tensor) -> Tensor:
    """Return a tile's matrices as the kernels read them; the rows take the place of those of a plain role, unread."""
    return rows if tile_kce is None else tile_kce.contiguous()
