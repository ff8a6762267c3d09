"""Simulation of the relation operator on a group of ranks that own relations (models/ops/relation_parallel).

A call has two parts: the local one, with all pairs of this rank's samples, and the owned one, with this rank's pairs of
the samples of all G ranks. Both are `SimulatedRelations`; between them rows and values of pairs are exchanged. Forward
and backward allocate in the order of models/ops/relation_parallel/functions.py, function by function.
"""

from __future__ import annotations

from dataclasses import replace

from ..core import BACKEND_COPIES, Gradients, Passed, Storage, Tape, Tensor
from .group_share import GroupShare
from .ops import ATTENTION_WEIGHTS, GRADIENTS
from .relation_ops import WORKSPACE, SimulatedRelations
from .relation_shape import RelationShape, SimulatedTile, shared_shape

EXCHANGED = "exchanges of the relation group"
_MOVING = ("query", "key", "value")
_GRAD_OUT = "gradient of the output"


class SimulatedGroupRelations(SimulatedRelations):
    """One call of the operator on one rank of a group.

    Args:
        tape: records the operation.
        shape: sizes of the call for this rank's samples, with the relations of all ranks.
        sources: the inputs by name; roles with the same input have the same tensor.
        logit_tiles, value_tiles: the tiles of this rank's relations.
        share: this rank's part.
    """

    def __init__(
        self,
        tape: Tape,
        shape: RelationShape,
        sources: dict[str, Tensor],
        logit_tiles: list[SimulatedTile],
        value_tiles: list[SimulatedTile],
        share: GroupShare,
    ) -> None:
        super().__init__(tape, shape, sources, logit_tiles, value_tiles)
        self.share = share
        owned_shape = shared_shape(replace(shape, geometry=share.owned, batch=share.ranks * shape.batch))
        self.owned = SimulatedRelations(tape, owned_shape, {}, logit_tiles, value_tiles)
        self.owned.source_widths = {name: self.source_widths[name] for name in _MOVING if name in sources}
        by_tensor: dict[int, list[str]] = {}
        for name in self.owned.source_widths:
            by_tensor.setdefault(id(sources[name]), []).append(name)
        self.shared = list(by_tensor.values())
        """Names of the inputs that travel; those that are one tensor stand together and travel once."""
        self.narrow = {"plain_value", *_MOVING}
        values = shape.batch * shape.heads
        self.all_pairs = values * share.whole.total_pairs
        """Values of all pairs of this rank's samples."""
        self.own_pairs = share.ranks * values * share.owned.total_pairs
        """Values of this rank's pairs of all samples."""
        self.weights: Storage | None = None
        self.kept = Passed()

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Run the operator; return the output of the relative and of the plain values, None for a missing one."""
        owned, sizes = self.owned, self.sizes
        self._logits()
        self._gather_sources()
        if self.logit_tiles:
            owned._open("logits", owned.shape.pairs * sizes.accumulator, ATTENTION_WEIGHTS)
        for tile in self.logit_tiles:
            owned._logit_tile(tile)
        self._exchange()
        attention = self.buffers["attention"]
        for tile in self.value_tiles:
            owned._value_tile(tile)
        if self.value_tiles:
            self.buffers["out"] = self._summed_output()
        return self._close(attention)

    def _relative_output(self) -> Storage:
        return self.buffers["out"]

    def _saved(self, attention: Storage) -> Passed:
        """Save the attention weights of this rank's pairs, too; the owned part ends with forward."""
        own = [] if self.weights is None else [self.weights]
        self.weights = None
        self.owned.buffers.clear()
        self.owned.wanted = {name for name in self.owned.source_widths if self.sources[name].node is not None}
        self.kept = Passed((*super()._saved(attention), *own))
        return self.kept

    # Exchanges.

    def _gather(self, name: str, width: int) -> None:
        """Collect rows of all ranks' samples."""
        size = self.owned.shape.rows * width * self.sizes.value
        self.owned._open(name, size, EXCHANGED)
        self._transient_of(BACKEND_COPIES, size if self.share.uses_gloo else 0)

    def _gather_sources(self) -> None:
        """Collect the rows of the relative roles, and allocate the scratch of the products."""
        for names in self.shared:
            self._gather(f"rows of {names[0]}", self.source_widths[names[0]])
        self.owned._open(WORKSPACE, self.owned.shape.workspace_bytes, WORKSPACE)

    def _sum_rows(self, width: int, what: str) -> Storage:
        """Send rows of all samples to their ranks, and add up what comes for this rank's samples."""
        shape, sizes = self.shape, self.sizes
        received = self.tape.new(self.owned.shape.rows * width * sizes.value, EXCHANGED)
        total = self.tape.new(shape.rows * width * sizes.accumulator, what)
        if self.half:
            # Each part is widened to be added.
            self._transient(shape.rows * width * sizes.accumulator)
            total = self.tape.new(shape.rows * width * sizes.value, what)
        del received
        return total

    def _summed_output(self) -> Storage:
        width, sizes = self.shape.d_out, self.sizes
        narrow = self.tape.new(self.owned.shape.rows * width * sizes.value, EXCHANGED) if self.half else None
        total = self._sum_rows(width, "activations")
        del narrow
        return total

    def _collect(self) -> Storage:
        """Send values of this rank's pairs, chosen from matrices, to the samples' ranks: (G·b, h, q) → (b, h, p)."""
        tape, value = self.tape, self.sizes.value
        sent = tape.new(self.own_pairs * self.sizes.accumulator, EXCHANGED)
        if self.half:
            sent = tape.new(self.own_pairs * value, EXCHANGED)
        received = tape.new(self.all_pairs * value, EXCHANGED)
        joined = tape.new(self.all_pairs * value, EXCHANGED)
        del sent, received
        return joined

    def _spread(self, width: int) -> Storage:
        """Send values of all pairs, of ``width`` bytes in their matrices, to their owners: (b, h, p) → (G·b, h, q)."""
        tape, size = self.tape, self.all_pairs * self.sizes.value
        values = tape.new(self.all_pairs * width, EXCHANGED)
        if width != self.sizes.value:
            values = tape.new(size, EXCHANGED)
        # The values of each owner are copied, and the copies joined.
        copies = tape.new(size if self.shape.batch * self.shape.heads > 1 else 0, EXCHANGED)
        sent = tape.new(size, EXCHANGED)
        del copies
        received = tape.new(self.own_pairs * self.sizes.value, EXCHANGED)
        del values, sent
        return received

    def _exchange(self) -> None:
        """Send the logits to the samples' ranks and, after the softmax, the attention weights to the owners."""
        owned, sizes, values = self.owned, self.sizes, None
        if self.logit_tiles:
            values = self._collect()
            del owned.buffers["logits"]
            if self.half:
                values = self.tape.new(self.all_pairs * sizes.accumulator, EXCHANGED)
        # The function holds the received logits until it returns.
        self._softmax()
        if self.value_tiles:
            self.weights = self._spread(sizes.value)
            owned._open("weights", owned.shape.pairs * sizes.value, ATTENTION_WEIGHTS)
        del values

    def _exchange_gradients(self) -> None:
        """Send the weights' gradients to the samples' ranks and those of the logits to the owners."""
        owned, sizes, values = self.owned, self.sizes, None
        if self.value_tiles:
            values = self._collect()
            self._transient(self.all_pairs * sizes.accumulator if self.half else 0)
            del owned.buffers["weights"], owned.buffers[_GRAD_OUT]
        self._softmax_backward()
        if self.logit_tiles:
            values = self._spread(sizes.accumulator)
            owned._open("logits", owned.shape.pairs * sizes.accumulator, GRADIENTS)
            self._transient(self.own_pairs * sizes.accumulator if self.half else 0)
        del values

    def _sum_gradients(self) -> list[Storage]:
        """Add up the gradients of each input, and send them to the samples' ranks.

        Returns:
            What the function still holds of the last input when the gradients of all are returned.
        """
        owned, tape = self.owned, self.tape
        parts: list[Storage] = []
        total = None
        for names in self.shared:
            if names[0] not in owned.wanted:
                continue
            parts = [owned.buffers[name] for name in names if name in owned.buffers]
            total = parts[0]
            for _ in parts[1:]:
                total = tape.new(total.size, GRADIENTS)
            width = self.source_widths[names[0]]
            narrow = tape.new(owned.shape.rows * width * self.sizes.value, EXCHANGED) if self.half else None
            self.buffers[names[0]] = self._sum_rows(width, GRADIENTS)
            del narrow
        owned.buffers.clear()
        return parts if total is None else [*parts, total]

    def _backward(self, grad: Storage) -> Gradients:
        owned, sizes = self.owned, self.sizes
        relative_grad = self.received.pop("relative", None)
        plain_grad = self.received.pop("plain", None)
        self._drop()
        self._start(plain_grad)
        if self.has_relative and relative_grad is None:
            relative_grad = self.tape.new(self.shape.rows * self.shape.d_out * sizes.value, GRADIENTS)
        self._gather_sources()
        if self.value_tiles:
            self._gather(_GRAD_OUT, self.shape.d_out)
            owned._open("weights", owned.shape.pairs * sizes.value, ATTENTION_WEIGHTS)
            owned._open("logits", owned.shape.pairs * sizes.accumulator, GRADIENTS)
            self.kept.pop()
        del plain_grad, relative_grad
        for tile in reversed(self.value_tiles):
            owned._value_tile_backward(tile)
        self._exchange_gradients()
        for tile in reversed(self.logit_tiles):
            owned._logit_tile_backward(tile)
        held = self._sum_gradients()
        results = self._finish()
        del held
        return results
