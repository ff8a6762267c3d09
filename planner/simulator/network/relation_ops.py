"""Simulation of the grouped relation operator (models/ops/grouped.py, models/ops/context.py): allocations in order.

Forward runs Open, the logit tiles, Softmax, the value tiles and Close; backward runs them in reverse. Sums over
relations have the accumulator's dtype, everything else the values'. Source: the operator's code, function by function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core import Gradients, Storage, Tape, Tensor
from .attention_ops import missing_pairs_bytes, relation_index_bytes
from .ops import ATTENTION_WEIGHTS, GRADIENTS, TEMPORARY, WEIGHT_GRADIENTS, product_scratch_bytes
from .relation_shape import RelationShape, SimulatedTerm, SimulatedTile

WORKSPACE = "workspace"


class SimulatedRelations:
    """One call of the operator.

    Args:
        tape: records the operation.
        shape: sizes of the call.
        sources: the inputs by name, as `RelationTables.forward` takes them.
        logit_tiles, value_tiles: the tiles in order; empty if none of their roles is relative.
        terms: relative scalars and vectors.
    """

    def __init__(
        self,
        tape: Tape,
        shape: RelationShape,
        sources: dict[str, Tensor],
        logit_tiles: list[SimulatedTile],
        value_tiles: list[SimulatedTile],
        terms: Sequence[SimulatedTerm] = (),
    ) -> None:
        self.tape, self.shape, self.sizes = tape, shape, shape.sizes
        self.sources = sources
        self.logit_tiles, self.value_tiles, self.terms = logit_tiles, value_tiles, terms
        self.half = self.sizes.value < self.sizes.accumulator
        self.narrow = {"plain_value"}  # Sources whose gradients have the values' dtype from the start.
        self.buffers: dict[str, Storage] = {}
        self.received: dict[str, Storage] = {}
        self.source_widths = {name: x.size // (shape.rows * self.sizes.value) for name, x in sources.items()}

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Run the operator; return the output of the relative and of the plain values, None for a missing one."""
        if self.logit_tiles or self.value_tiles:
            self._open(WORKSPACE, self.shape.workspace_bytes, WORKSPACE)
        self._logits()
        for tile in self.logit_tiles:
            self._logit_tile(tile)
        for term in self.terms:
            if term.kind != "value":
                self._term(term)
        self._softmax()
        for term in self.terms:
            if term.kind == "value":
                self._open("out", self.shape.rows * self.shape.inner * self.sizes.accumulator)
                self._term(term)
        attention = self.buffers["attention"]
        for tile in self.value_tiles:
            self._value_tile(tile)
        return self._close(attention)

    def _open(self, name: str, size: int, what: str = TEMPORARY) -> None:
        if name not in self.buffers:
            self.buffers[name] = self.tape.new(size, what)

    def _transient(self, *sizes: int) -> None:
        """Allocate storages together and free them at once."""
        self.tape.new_transient(TEMPORARY, *sizes)

    def _transient_of(self, what: str, size: int) -> None:
        self.tape.new_transient(what, size)

    def _heads_scratch(self) -> int:
        """Return the scratch bytes of a product of queries and keys, or of weights and values, by heads."""
        tokens, head_dim = self.shape.geometry.tokens, self.shape.inner // self.shape.heads
        return product_scratch_bytes(tokens, max(tokens, head_dim), tokens, self.sizes, transposed=True)

    def _plain_bytes(self) -> int:
        return self.shape.rows * self.shape.inner * self.sizes.value

    def _by_heads(self, count: int = 1) -> Storage:
        """Copy plain rows by heads, as products need them, unless they are contiguous that way already."""
        copied = self.shape.heads > 1 and self.shape.batch > 1
        return self.tape.new(count * self._plain_bytes() if copied else 0, TEMPORARY)

    def _plain_product(self, what: str = GRADIENTS) -> Storage:
        """Multiply attention weights by plain rows by heads, and join the heads."""
        copy = self._by_heads()
        product = self.tape.new(self._plain_bytes(), what)
        self._transient(self._heads_scratch())
        del copy
        return self.tape.new(self._plain_bytes(), what) if self.shape.heads > 1 else product

    def _logits(self) -> None:
        shape, sizes = self.shape, self.sizes
        if "plain_query" in self.sources:
            copies = self._by_heads(2)
            self._open("logits", shape.pairs * sizes.value, ATTENTION_WEIGHTS)
            self._transient(self._heads_scratch())
            del copies
            if self.half:
                wide = self.tape.new(shape.pairs * sizes.accumulator, ATTENTION_WEIGHTS)
                self.buffers["logits"] = wide
        else:
            self._open("logits", shape.pairs * sizes.accumulator, ATTENTION_WEIGHTS)

    def _logit_tile(self, tile: SimulatedTile) -> None:
        shape, heads, sizes = self.shape, self.shape.heads, self.sizes
        own = shape.tile_sizes(tile)
        self.tape.hooks.fetch(tile.weights, backward=False)
        value = heads * sizes.value
        cast = heads * sizes.accumulator if self.half and "plain_query" in self.sources else 0
        self._transient(own.matrix_bytes)
        self._transient(2 * own.rows * value, own.rows * cast)
        self._transient(own.scratch)
        self._transient_of(WORKSPACE, own.batched[False, False])
        rows, found = own.class_rows, own.class_relations
        # One side is the class token, which is broadcast: the products of both relations are new tensors.
        self._transient(found * rows * shape.d_out * sizes.value, 2 * rows * value, rows * cast)
        self.tape.hooks.release(tile.weights, backward=False)

    def _softmax(self) -> None:
        shape, sizes = self.shape, self.sizes
        if "plain_query" in self.sources and not shape.geometry.complete and self.logit_tiles + self.value_tiles:
            self._transient(missing_pairs_bytes(shape.geometry))
        self._transient(shape.rows * shape.heads * sizes.accumulator)
        logits = self.buffers.pop("logits")
        self.buffers["attention"] = self.tape.new(shape.pairs * sizes.value, ATTENTION_WEIGHTS) if self.half else logits
        self._drop()
        del logits

    def _drop(self) -> None:
        """Simulate dropout of the attention weights; without dropout values are multiplied by the attention itself."""
        if self.shape.dropout:
            noise = self.tape.new(self.shape.pairs * self.sizes.value, TEMPORARY)
            self._open("weights", self.shape.pairs * self.sizes.value, ATTENTION_WEIGHTS)
            del noise

    def _value_tile(self, tile: SimulatedTile) -> None:
        shape, sizes = self.shape, self.sizes
        own = shape.tile_sizes(tile)
        self.tape.hooks.fetch(tile.weights, backward=False)
        self._open("out", shape.rows * shape.d_out * sizes.accumulator)
        self._transient(own.matrix_bytes)
        self._transient(own.rows * shape.d_out * sizes.accumulator if self.half else 0)
        self._transient(own.scratch)
        self._transient_of(WORKSPACE, own.batched[True, False])
        if own.has_last:
            # The class token's value, weighted for every query, and its copy with contiguous heads.
            row = own.class_rows * shape.d_out
            self._transient(2 * row * sizes.value, row * sizes.accumulator if self.half else 0)
        self.tape.hooks.release(tile.weights, backward=False)

    def _term(self, term: SimulatedTerm) -> None:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        tape.hooks.fetch(term.weights, backward=False)
        square = shape.geometry.tokens**2
        self._transient(relation_index_bytes(shape.geometry))
        if term.kind == "bias":
            self._transient(
                8 * square,
                square * shape.heads * sizes.value,
                square * shape.heads * sizes.accumulator if self.half else 0,
            )
        else:
            self._chunks(term.kind)
        tape.hooks.release(term.weights, backward=False)

    def _chunks(self, kind: str, *, backward: bool = False) -> None:
        """Simulate the temporaries of relative vectors for a chunk of query positions, one step after the other."""
        shape, sizes = self.shape, self.sizes
        tokens, head_dim = shape.geometry.tokens, shape.inner // shape.heads
        chunk = min(tokens, max(1, shape.workspace_limit // (2 * tokens * head_dim * sizes.parameter)))
        vectors = chunk * tokens * head_dim
        pairs, rows = chunk * shape.batch * shape.heads * tokens, chunk * shape.batch * shape.inner
        copied = rows if shape.heads > 1 and shape.batch > 1 else 0
        wide = sizes.accumulator if self.half else 0
        # Per step: values of operands and product, in addition to the vectors, and values that are widened to be added.
        grads = pairs if self.half else 0
        steps = [(copied + pairs, pairs) if kind == "key" else (rows, rows)]
        if backward and kind == "key":
            steps = [(grads + rows, rows), (grads + copied + vectors, 0), (grads + vectors, vectors)]
        elif backward:
            steps = [(copied + pairs, pairs), (copied + pairs + vectors, vectors)]
        index = 8 * tokens**2 * (2 if backward else 1)
        for narrow, widened in steps:
            # Vectors that autocast casts are freed before anything is widened.
            other = max(widened * wide, vectors * sizes.value if sizes.casts else 0)
            self._transient(index, vectors * sizes.parameter + narrow * sizes.value + other)

    def _term_backward(self, term: SimulatedTerm) -> None:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        tape.hooks.fetch(term.weights, backward=True)
        square = shape.geometry.tokens**2
        numel = term.weights.numels[0]
        grads = square * shape.heads * sizes.accumulator
        if term.kind == "bias":
            # Summed over the samples and divided, before anything else is allocated.
            self._transient(2 * grads)
        sums = tape.new(numel * sizes.accumulator, TEMPORARY)
        if term.kind == "bias":
            self._transient(grads, relation_index_bytes(shape.geometry))
        else:
            if term.kind == "key":
                self._open("plain_query", shape.rows * shape.inner * sizes.accumulator, GRADIENTS)
            self._chunks(term.kind, backward=True)
        narrow = sizes.parameter < sizes.accumulator
        made = [tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS)] if narrow else [sums]
        del sums
        tape.hooks.gradients(term.weights, made)
        tape.hooks.release(term.weights, backward=True)

    def _close(self, attention: Storage) -> tuple[Tensor | None, Tensor | None]:
        tape = self.tape
        outputs: dict[str, Storage] = {}
        if "out" in self.buffers:
            outputs["relative"] = self._relative_output()
        if "plain_value" in self.sources:
            outputs["plain"] = self._plain_product("activations")
        self.buffers.clear()
        close = tape.result(attention, list(self.sources.values()), self._backward, self._saved(attention))
        # This object must not hold inputs: the node saves what backward needs.
        self.names, self.wanted = tuple(self.sources), {n for n, x in self.sources.items() if x.node is not None}
        self.sources = {}
        self.has_relative = "relative" in outputs
        given = {name: tape.result(storage, (close,), self._receiver(name)) for name, storage in outputs.items()}
        return given.get("relative"), given.get("plain")

    def _saved(self, attention: Storage) -> Sequence[Storage]:
        return (attention, *(source.storage for source in self.sources.values()))

    def _relative_output(self) -> Storage:
        narrow = self.shape.rows * self.shape.d_out * self.sizes.value
        return self.tape.new(narrow) if self.half else self.buffers["out"]

    def _receiver(self, name: str) -> Callable[[Storage], Gradients]:
        def receive(grad: Storage) -> Gradients:
            self.received[name] = grad
            return (self.tape.new(0, GRADIENTS),)

        return receive

    def _backward(self, grad: Storage) -> Gradients:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        relative_grad = self.received.pop("relative", None)
        plain_grad = self.received.pop("plain", None)
        if self.logit_tiles or self.value_tiles:
            self._open(WORKSPACE, shape.workspace_bytes, WORKSPACE)
        self._drop()
        self._start(plain_grad)
        del plain_grad
        if self.has_relative and relative_grad is None:
            relative_grad = tape.new(shape.rows * shape.d_out * sizes.value, GRADIENTS)
        for term in self.terms:
            if term.kind == "value":
                self._term_backward(term)
        for tile in reversed(self.value_tiles):
            self._value_tile_backward(tile)
        self._softmax_backward()
        for tile in reversed(self.logit_tiles):
            self._logit_tile_backward(tile)
        for term in self.terms:
            if term.kind != "value":
                self._term_backward(term)
        return self._finish()

    def _softmax_backward(self) -> None:
        shape, sizes = self.shape, self.sizes
        if shape.dropout:
            noise = shape.pairs * sizes.value
            self._transient(noise, shape.pairs * sizes.accumulator if self.half else 0)
        self.buffers.pop("weights", None)
        # Half-precision weights are widened and multiplied by the row sums in a third tensor.
        wide, sums = (2 * shape.pairs if self.half else 0), shape.rows * shape.heads
        self._transient(wide * sizes.accumulator, sums * sizes.accumulator)

    def _start(self, plain_grad: Storage | None) -> None:
        """Allocate the gradients of the attention weights and of the plain values."""
        shape, sizes = self.shape, self.sizes
        if plain_grad is None:
            self._open("logits", shape.pairs * sizes.accumulator, GRADIENTS)
            return
        copies = self._by_heads(2)
        self._open("logits", shape.pairs * sizes.value, GRADIENTS)
        self._transient(self._heads_scratch())
        del copies
        if self.half:
            self.buffers["logits"] = self.tape.new(shape.pairs * sizes.accumulator, GRADIENTS)
        if "plain_value" in self.wanted:
            self.buffers["plain_value"] = self._plain_product()

    def _input_gradient(self, name: str, width: int) -> None:
        """Allocate the gradient of a source, summed over relations, when the first tile adds to it."""
        if name in self.wanted:
            self._open(name, self.shape.rows * width * self.sizes.accumulator, GRADIENTS)

    def _value_tile_backward(self, tile: SimulatedTile) -> None:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        own = shape.tile_sizes(tile)
        tape.hooks.fetch(tile.weights, backward=True)
        grads = [tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS) for numel in tile.weights.numels]
        cast = sizes.accumulator if self.half else 0
        self._transient_of(WORKSPACE, own.batched[True, True])
        self._input_gradient("value", shape.d_in)
        row = shape.heads * sizes.value + max(shape.heads, shape.d_in) * cast
        self._transient(own.rows * row, 2 * own.matrix_bytes)
        self._transient(own.scratch)
        self._transient(own.gradient_scratch)
        if own.class_relations and own.has_last:
            rows = own.class_rows
            self._transient(2 * rows * shape.d_out * sizes.value, rows * row, 2 * own.matrix_bytes)
        tape.hooks.gradients(tile.weights, grads)
        tape.hooks.release(tile.weights, backward=True)

    def _logit_tile_backward(self, tile: SimulatedTile) -> None:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        own = shape.tile_sizes(tile)
        tape.hooks.fetch(tile.weights, backward=True)
        grads = [tape.new(numel * sizes.parameter, WEIGHT_GRADIENTS) for numel in tile.weights.numels]
        cast = sizes.accumulator if self.half else 0
        row_widths = {name: self.source_widths.get(name, shape.d_in) for name in ("query", "key")}
        for name, width in row_widths.items():
            self._input_gradient(name, width)
        self._transient_of(WORKSPACE, own.batched[False, True])
        # Rows are widened to be added; the rows of a plain role have the width of its source.
        row = (shape.heads * sizes.value if self.half else 0) + max(row_widths.values()) * cast
        self._transient(own.rows * row, 2 * own.matrix_bytes)
        self._transient(own.scratch)
        self._transient(own.gradient_scratch)
        if own.class_relations:
            rows = own.class_rows
            self._transient(3 * rows * shape.d_out * sizes.value, rows * row, 2 * own.matrix_bytes)
        tape.hooks.gradients(tile.weights, grads)
        tape.hooks.release(tile.weights, backward=True)

    def _finish(self) -> Gradients:
        shape, sizes, tape = self.shape, self.sizes, self.tape
        cast = product = None
        narrow = set(self.narrow)
        if "plain_query" in self.names:
            cast = tape.new(shape.pairs * sizes.value, GRADIENTS) if self.half else None
            for name in ("plain_query", "plain_key"):
                if name not in self.wanted:
                    continue
                product = self._plain_product()
                if name in self.buffers:
                    # A relative vector has begun the sum; the local name holds the product until the next iteration.
                    widened = tape.new(self.buffers[name].size if self.half else 0, TEMPORARY)
                    self.buffers[name] = tape.new(self.buffers[name].size, GRADIENTS)
                    del widened
                else:
                    self.buffers[name] = product
                    narrow.add(name)
        results: list[Storage | None] = []
        for name in self.names:
            held = self.buffers.get(name)
            if held is not None and self.half and name not in narrow:
                held = tape.new(held.size * sizes.value // sizes.accumulator, GRADIENTS)
            results.append(held)
        self.buffers.clear()
        del cast, product
        return results
