"""Simulation of the published relation operator, which gathers a matrix for every pair and sample; and of matrices per
position (operator absolute).

The methods follow torch's operations in the order in which `gather_attention` calls them. An operand that a product
broadcasts is copied, and the copy is saved for backward with the other operand.

Source: models/ops/naive.py, models/layers/tables.py; events of torch 2.13's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core import Gradients, ModuleParams, Storage, Tape, Tensor
from .ops import (
    ATTENTION_WEIGHTS,
    GRADIENTS,
    INDEX_BYTES,
    TEMPORARY,
    WEIGHT_GRADIENTS,
    DtypeSizes,
    cast,
    cast_parameters,
    product_scratch_bytes,
    weight_gradients,
)
from .relation_shape import RelationShape, SimulatedTile

GATHERED_MATRICES, JOINED_TABLES = "gathered matrices", "joined tables"


class SimulatedGather:
    """One call of the operator.

    Args:
        tape: records the operations.
        shape: sizes of the call.
        sources: the inputs by name, as `gather_attention` takes them. Those named "plain_…" may share a storage.
        relative: names of the sources that are multiplied by a table.
        logit_tiles, value_tiles: the tiles of the tables.
    """

    def __init__(
        self,
        tape: Tape,
        shape: RelationShape,
        sources: dict[str, Tensor],
        relative: Sequence[str],
        logit_tiles: Sequence[SimulatedTile],
        value_tiles: Sequence[SimulatedTile],
    ) -> None:
        self.tape, self.shape, self.sources, self.relative = tape, shape, sources, relative
        self.logit_tiles, self.value_tiles = logit_tiles, value_tiles
        width = shape.sizes.value
        self.square = shape.geometry.tokens**2
        pairs = shape.batch * self.square
        matrix = shape.d_in * shape.d_out * width
        self.table_bytes, self.gathered_bytes, self.copied_bytes = (
            count * matrix for count in (shape.geometry.relations, self.square, pairs)
        )
        self.rows_in, self.rows_out = pairs * shape.d_in * width, pairs * shape.d_out * width
        self.weight_bytes = shape.pairs * width
        self.plain_bytes = shape.rows * shape.inner * width
        self.given: dict[ModuleParams, list[Storage]] = {}

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Run the operator; return the output of the relative and of the plain values, None for a missing one."""
        tape, sources = self.tape, self.sources
        # The recorded operations refer to this object, so it must not keep the inputs alive.
        self.sources = {}
        tables = {name: self._table(name) for name in self.relative}
        noise = [tape.new(self.weight_bytes, ATTENTION_WEIGHTS) for _ in range(2 if self.shape.dropout else 0)]
        found = tape.new(self.square * INDEX_BYTES, TEMPORARY)
        exists, index = tape.new(self.square), tape.new(self.square * INDEX_BYTES)
        del found
        # The reference's local names hold these until it returns.
        logits, held = self._logits(sources, tables, index)
        attention = self._weights(logits, noise[1] if noise else None)
        relative = plain = None
        if "value" in sources:
            value = self._reshaped(self._per_pair(sources["value"], tables["value"], index))
            held.append(value)
            relative = self._weighted(attention, value)
        if "plain_value" in sources:
            plain = self._plain_output(attention, sources["plain_value"])
        del held, exists
        return relative, plain

    def _table(self, name: str) -> Tensor:
        """Join a role's tiles, reorder them as in the paper and cast them to the rows' dtype; saves the order."""
        tape, sizes = self.tape, self.shape.sizes
        tiles = self.value_tiles if name == "value" else self.logit_tiles
        numel = self.table_bytes // sizes.value
        size = numel * sizes.parameter

        def give(grad: Storage) -> Gradients:
            # A tile's gradient is a view of the table's gradient and stays in that storage.
            for tile in tiles:
                found = self.given.setdefault(tile.weights, [])
                found.append(grad)
                if len(found) == len(tile.weights.numels):
                    tape.hooks.gradients(tile.weights, self.given.pop(tile.weights))
            return ()

        joined = tape.result(tape.new(size, JOINED_TABLES), (), give)
        order = tape.new(self.shape.geometry.relations * INDEX_BYTES)
        ordered = tape.result(
            tape.new(size, JOINED_TABLES), (joined,), lambda grad: (tape.new(size, WEIGHT_GRADIENTS),), (order,)
        )
        del joined
        return cast(tape, ordered, numel, sizes.wide, sizes)

    def _logits(
        self, sources: dict[str, Tensor], tables: dict[str, Tensor], index: Storage
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the sum of both terms' logits, and the rows that local names hold."""
        tape, size = self.tape, self.weight_bytes
        held: list[Tensor] = []
        terms: list[Tensor] = []
        if "query" in sources:
            held = [self._rows(name, sources[name], tables, index) for name in ("query", "key")]
            query, key = (self._reshaped(rows) for rows in held)
            product = self._product(query, key, self.rows_out, (self.rows_out, self.rows_out))
            terms.append(tape.result(tape.new(size, ATTENTION_WEIGHTS), (product,), lambda grad: (grad,)))
            del product
        if "plain_query" in sources:
            held = []
            query, key = (self._by_heads(sources[name]) for name in ("plain_query", "plain_key"))
            terms.append(self._product(query, key, size, (self.plain_bytes, self.plain_bytes)))
            count = len(terms)
            terms = [tape.result(tape.new(size, ATTENTION_WEIGHTS), terms, lambda grad: [grad] * count)]
        return terms[0], held

    def _rows(self, name: str, x: Tensor, tables: dict[str, Tensor], index: Storage) -> Tensor:
        """Return a row for every pair: a product, or an expanded view of a plain role's rows."""
        tape = self.tape
        if name not in tables:
            size = x.size
            return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))
        if name == "query":
            reverse = tape.new(self.shape.geometry.relations * INDEX_BYTES, TEMPORARY)
            index = tape.new(index.size)
            del reverse
        return self._per_pair(x, tables[name], index)

    def _per_pair(self, x: Tensor, table: Tensor, index: Storage) -> Tensor:
        """Multiply rows by the matrix of each pair; saves copies of both for every pair and sample."""
        tape, shape, table_bytes = self.tape, self.shape, self.table_bytes
        gathered = tape.result(
            tape.new(self.gathered_bytes, GATHERED_MATRICES),
            (table,),
            lambda grad: (tape.new(table_bytes, GRADIENTS),),
            (index,),
        )
        rows = self._copied(x, self.rows_in)
        matrices = self._copied(gathered, self.copied_bytes, what=GATHERED_MATRICES)
        scratch = product_scratch_bytes(1, shape.d_in, shape.d_out, shape.sizes)
        return self._product(rows, matrices, self.rows_out, (self.rows_in, self.copied_bytes), scratch)

    def _copied(self, x: Tensor, size: int, what: str = "activations") -> Tensor:
        """Broadcast a tensor to ``size`` bytes in a contiguous copy, as a product needs it; backward sums."""
        tape, before = self.tape, x.size
        sums = size > before or what == GATHERED_MATRICES
        out = tape.new(size, what) if size > before else x.storage
        return tape.result(out, (x,), lambda grad: (tape.new(before, GRADIENTS) if sums else grad,))

    def _product(self, x: Tensor, y: Tensor, size: int, grads: tuple[int, int], scratch: int = 0) -> Tensor:
        """Multiply two tensors to ``size`` bytes; saves both factors; backward allocates ``grads`` bytes for them."""
        tape = self.tape
        out = tape.new(size)
        tape.new(scratch, TEMPORARY)

        def backward(grad: Storage) -> Gradients:
            given = [tape.new(one, GRADIENTS) for one in grads]
            tape.new(scratch, TEMPORARY)
            return given

        return tape.result(out, (x, y), backward, (x.storage, y.storage))

    def _reshaped(self, x: Tensor) -> Tensor:
        """View every pair's row by heads; the gradient has another memory layout and is copied."""
        tape, size = self.tape, self.rows_out
        return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))

    def _by_heads(self, x: Tensor) -> Tensor:
        """Return plain rows by heads: a copy unless they are contiguous that way already."""
        copies = self.shape.heads > 1 and self.shape.batch > 1
        return self.tape.result(self.tape.new(self.plain_bytes) if copies else x.storage, (x,), lambda grad: (grad,))

    def _same_size(self, x: Tensor, *saved: Storage) -> Tensor:
        """Apply an operation to each attention weight; saves ``saved``; the gradient is a new tensor."""
        tape, size = self.tape, self.weight_bytes
        return tape.result(tape.new(size, ATTENTION_WEIGHTS), (x,), lambda grad: (tape.new(size, GRADIENTS),), saved)

    def _weights(self, logits: Tensor, noise: Storage | None) -> Tensor:
        """Scale, mask and softmax the logits, set rows of queries without keys to zero, and apply dropout."""
        tape, shape = self.tape, self.shape
        scaled = self._same_size(logits)
        masked = self._same_size(scaled, tape.new(self.square))
        del scaled
        softmax = tape.new(self.weight_bytes, ATTENTION_WEIGHTS)
        size = softmax.size
        attention = tape.result(softmax, (masked,), lambda grad: (tape.new(size, GRADIENTS),), (softmax,))
        unseen = tape.new(shape.pairs, TEMPORARY)
        empty = tape.new(shape.rows * shape.heads)
        del unseen
        attention = self._same_size(attention, empty)
        return attention if noise is None else self._same_size(attention, noise)

    def _weighted(self, attention: Tensor, value: Tensor) -> Tensor:
        """Sum every pair's value times its weight; saves both."""
        tape, shape = self.tape, self.shape

        def backward(grad: Storage) -> Gradients:
            expanded, of_value = tape.new(self.rows_out, GRADIENTS), tape.new(self.rows_out, GRADIENTS)
            of_attention = tape.new(self.weight_bytes, GRADIENTS)
            del expanded
            return of_attention, of_value

        product = tape.result(tape.new(self.rows_out), (attention, value), backward, (attention.storage, value.storage))
        size = shape.rows * shape.d_out * shape.sizes.value
        return tape.result(tape.new(size), (product,), lambda grad: (grad,))

    def _plain_output(self, attention: Tensor, value: Tensor) -> Tensor:
        """Multiply weights by plain values and join the heads."""
        tape, size = self.tape, self.plain_bytes
        value = self._by_heads(value)
        product = self._product(attention, value, size, (self.weight_bytes, size))
        if self.shape.heads == 1:
            return product
        return tape.result(tape.new(size), (product,), lambda grad: (tape.new(size, GRADIENTS),))


def positions(
    tape: Tape,
    x: Tensor,
    batch: int,
    d_in: int,
    d_out: int,
    tiles: list[tuple[int, ModuleParams]],
    sizes: DtypeSizes,
    given: DtypeSizes,
) -> Tensor:
    """Multiply every token by the matrix of its position, tile by tile, and join the results; saves its input.

    Args:
        tape, x, d_in, d_out, sizes: as in `linear`.
        batch: samples of the micro-batch.
        tiles: number of positions and parameters of each tile.
        given: sizes of x.
    """
    total = batch * sum(count for count, _ in tiles)
    parts = []
    for count, weights in tiles:
        part = x if len(tiles) == 1 else _slice(tape, x, total * d_in * given.value)
        parts.append(_position_tile(tape, part, batch * count, d_in, d_out, weights, sizes, given))
        del part
    return tape.result(tape.new(total * d_out * sizes.value), parts, lambda grad: [grad] * len(tiles))


def _slice(tape: Tape, x: Tensor, size: int) -> Tensor:
    """Return a view of some rows; its gradient has the size of the full input and is zero elsewhere."""
    return tape.result(x.storage, (x,), lambda grad: (tape.new(size, GRADIENTS),))


def _position_tile(
    tape: Tape, x: Tensor, rows: int, d_in: int, d_out: int, weights: ModuleParams, sizes: DtypeSizes, given: DtypeSizes
) -> Tensor:
    tape.hooks.fetch(weights, backward=False)
    casts = cast_parameters(tape, weights, sizes)
    x = cast(tape, x, rows * d_in, given, sizes)
    out = tape.new(rows * d_out * sizes.value)
    # The product saves its operands: the matrices, or under autocast their casts.
    kept = [copy.storage for copy in casts] or tape.kept_weights(weights)
    tape.hooks.release(weights, backward=False)

    def backward(grad: Storage) -> Gradients:
        tape.hooks.fetch(weights, backward=True)
        part = tape.new(rows * d_in * sizes.value, GRADIENTS)
        if casts_back:
            tape.hooks.release(weights, backward=True)
            return (part, tape.new(weights.numels[0] * sizes.value, GRADIENTS))
        weight_gradients(tape, weights, sizes.parameter)
        tape.hooks.release(weights, backward=True)
        return (part,)

    casts_back = len(casts)
    return tape.result(out, (x, *casts), backward, (x.storage, *kept))
