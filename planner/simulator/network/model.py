"""Simulation of a full network in one training step: embedding, blocks, head and loss, forward and backward.

Source: models/networks/. A block is in block.py, torch's operations are in ops.py, the relation operator is in
relation_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod

from ...common.errors import InputError
from ...common.phases import Phase
from ...config.model import GptSpec, ModelSpec, PatchSpec
from ...config.training import LossKind
from ..core import MemoryTracker, ModuleParams, ParameterHooks, Storage, Tape, Tensor
from .block import SimulatedBlock, linear_weights, norm_weights
from .group_share import GroupShare
from .head_ops import chunked_cross_entropy, cross_entropy, embed, mixed_cross_entropy, pool_first, pool_mean
from .norm_ops import norm
from .ops import (
    GRADIENTS,
    INDEX_BYTES,
    DtypeSizes,
    add_positions,
    cast,
    dropout,
    linear,
    prepend,
)
from .relation_shape import Implementation, fused_list_bytes

RANDOM_STATE_BYTES = 5056
"""Bytes of the state of torch's CPU random number generator, which activation checkpointing restores."""
OFFLOADED = "offloaded activations"
MICRO_BATCHES = "micro-batches"
IMAGE_BYTES = 4
"""Bytes of a value of an image on the host."""


class SimulatedNetwork:
    """A full network and its loss.

    Args:
        spec: the model.
        batch: samples of the micro-batch.
        sizes: bytes per value.
        tile_relations: relations per tile; None for one tile per table.
        implementation: of relation tables.
        loss: how the loss is computed.
        share: the rank's part in a group that shares out the relations; None if it has all of them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        sizes: DtypeSizes,
        tile_relations: int | None = None,
        implementation: Implementation = "grouped",
        *,
        loss: LossKind = "whole",
        share: GroupShare | None = None,
    ) -> None:
        self.spec, self.batch, self.sizes, self.loss_kind = spec, batch, sizes, loss
        self.share = share
        self.host = MemoryTracker()
        self.states: list[Storage] = []
        if sizes.casts and spec.checkpointing == "offload":
            # fairscale recomputes outside of autocast on a CPU, and in fp16 on a GPU.
            raise InputError("checkpointing: offload is not allowed: must be none or block under autocast")
        # Values between blocks: autocast widens what is joined with or added to a parameter.
        self.embedded = sizes if isinstance(spec, PatchSpec) and sizes.device == "cpu" else sizes.wide
        widened = spec.learned_positions or (isinstance(spec, PatchSpec) and spec.class_token)
        self.stream = sizes.wide if widened else self.embedded
        self.blocks = [
            SimulatedBlock(spec, operator, tile_relations, batch, sizes, implementation, self.stream, share)
            for operator in spec.layer_operators
        ]
        dim = spec.dim
        self.embedding: tuple[ModuleParams, ...]
        if isinstance(spec, PatchSpec):
            self.embedding = (
                norm_weights(spec, spec.patch_dim),
                linear_weights(spec.patch_dim, dim, bias=spec.bias),
                norm_weights(spec, dim),
            )
            self.head = linear_weights(dim, spec.classes, bias=spec.bias)
        else:
            self.embedding = (
                ModuleParams((spec.vocabulary * dim,), shared=spec.tied_embeddings, lengths=(spec.vocabulary,)),
            )
            self.head = self.embedding[0] if spec.tied_embeddings else linear_weights(dim, spec.vocabulary, bias=False)
        self.class_token = ModuleParams((dim,), lengths=(1,))
        self.positions = ModuleParams((spec.tokens * dim,), lengths=(1,)) if spec.learned_positions else None
        self.norm, self.head_norm = norm_weights(spec, dim), norm_weights(spec, dim)

    @property
    def modules(self) -> list[ModuleParams]:
        """The parameters of each module, in the order of ``Module.modules()``."""
        learned = [self.class_token] if isinstance(self.spec, PatchSpec) and self.spec.class_token else []
        learned += [self.positions] if self.positions is not None else []
        ends = [self.norm] if isinstance(self.spec, PatchSpec) else [self.norm, self.head_norm]
        blocks = [weights for block in self.blocks for weights in block.modules]
        return [*self.embedding, *learned, *blocks, *ends, *([] if self.head.shared else [self.head])]

    @property
    def construction(self) -> list[ModuleParams]:
        """The parameters of each module in the order of construction: all operators first."""
        operators = [weights for block in self.blocks for weights in block.construction]
        made = set(map(id, operators))
        return operators + [weights for weights in self.modules if id(weights) not in made]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the cosines and sines of layers with rotary embedding, and of index lists of pairs.

        All layers of a GPU share lists: query, key and position of each pair, and its slot on either side. In a
        relation group each layer has the positions of pairs.
        """
        spec = self.spec
        rotary_layers = sum(
            spec.rotary_attention if operator == "attention" else spec.rotary for operator in spec.layer_operators
        )
        with_tables = sum(operator in ("translution", "alpha") for operator in spec.layer_operators)
        share, grouped = self.share, with_tables and self.sizes.batched
        geometry = spec.geometry if share is None else share.owned
        lists = geometry.total_pairs * 7 * INDEX_BYTES if grouped else 0
        if grouped and self.sizes.fused:
            samples = self.batch * (1 if share is None else share.ranks)
            lists += fused_list_bytes(geometry.total_pairs, geometry.relations, samples)
        if share is not None:
            # Each layer has the positions of all pairs, sorted by owner; on a CPU also of the pairs that do not exist.
            places = share.whole.tokens**2 if self.sizes.device == "cpu" else share.whole.total_pairs
            lists += with_tables * places * INDEX_BYTES
        return rotary_layers * spec.tokens * spec.head_dim * self.sizes.parameter + lists

    @property
    def batch_bytes(self) -> tuple[int, int]:
        """Bytes on the device of a micro-batch's inputs, images in the parameters' dtype or token ids, and targets."""
        targets = self.batch * target_bytes(self.spec, self.loss_kind)
        if isinstance(self.spec, PatchSpec):
            return self.batch * prod(self.spec.sample_shape) * self.sizes.parameter, targets
        return self.batch * self.spec.tokens * INDEX_BYTES, targets

    @property
    def shared_batch_bytes(self) -> int:
        """Bytes of them that are the samples of the host themselves: a CPU copies only images to another dtype."""
        if self.sizes.device != "cpu":
            return 0
        inputs, targets = self.batch_bytes
        copied = isinstance(self.spec, PatchSpec) and self.sizes.parameter != IMAGE_BYTES
        return targets if copied else inputs + targets

    def _embed(self, tape: Tape, inputs: Storage) -> Tensor:
        spec, sizes, batch = self.spec, self.sizes, self.batch
        tape.memory.site = "embedding"
        if isinstance(spec, GptSpec):
            return embed(tape, batch * spec.tokens, spec.dim, self.embedding[0], inputs, sizes.wide)
        patches = batch * spec.geometry.patches
        image = Tensor(tape.new(patches * spec.patch_dim * sizes.parameter))
        x = norm(tape, image, patches, spec.patch_dim, self.embedding[0], sizes.wide, spec)
        x = linear(tape, x, patches, spec.patch_dim, spec.dim, self.embedding[1], sizes, given=sizes.wide)
        # On a GPU autocast runs layer norms in fp32.
        x = cast(tape, x, patches * spec.dim, sizes, self.embedded)
        copies = patches * spec.dim * sizes.value if spec.class_token and not sizes.casts else 0
        x = norm(tape, x, patches, spec.dim, self.embedding[2], self.embedded, spec, copies=copies)
        del image
        return x

    def forward(self, tape: Tape, inputs: Storage) -> Tensor:
        """Run the network on a micro-batch; return the logits, or the loss if it is chunked."""
        output = self._forward(tape, inputs)
        # Autocast's context ends with the network's forward.
        tape.casts.clear()
        return output

    def _forward(self, tape: Tape, inputs: Storage) -> Tensor:
        spec, sizes, batch, stream = self.spec, self.sizes, self.batch, self.stream
        rows = batch * spec.tokens
        x, given = self._embed(tape, inputs), self.embedded
        if isinstance(spec, PatchSpec) and spec.class_token:
            size = batch * spec.geometry.patches * spec.dim
            x = prepend(tape, cast(tape, x, size, given, stream), rows * spec.dim, self.class_token, stream)
            given = stream
        if self.positions is not None:
            x = add_positions(tape, x, self.positions, given)
        if spec.dropout:
            x = dropout(tape, x, stream)
        for block in self.blocks:
            x = block.forward(tape, x) if spec.checkpointing == "none" else self._checkpointed(tape, block, x)
        tape.memory.site = "head"
        x = norm(tape, x, rows, spec.dim, self.norm, stream, spec)
        if isinstance(spec, PatchSpec):
            size = batch * spec.dim * stream.value
            pooled = pool_first(tape, x) if spec.pool == "class" else pool_mean(tape, x, size, stream)
            return linear(tape, pooled, batch, spec.dim, spec.classes, self.head, sizes, given=stream)
        x = norm(tape, x, rows, spec.dim, self.head_norm, stream, spec)
        if self.loss_kind == "chunked":
            tape.memory.site = "loss"
            return chunked_cross_entropy(tape, x, rows, spec.dim, spec.vocabulary, self.head, sizes)
        return linear(tape, x, rows, spec.dim, spec.vocabulary, self.head, sizes, given=stream)

    def _checkpointed(self, tape: Tape, block: SimulatedBlock, x: Tensor) -> Tensor:
        """Run a block under activation checkpointing: it saves only its input and is recomputed in backward."""
        spec = self.spec
        offload = spec.checkpointing == "offload"
        offloaded = offload and self.sizes.device != "cpu"
        narrows = self.stream.value != self.sizes.value
        state_bytes = RANDOM_STATE_BYTES if self.sizes.device == "cpu" else 0
        state = tape.new(state_bytes, "random states")
        if offload:
            # fairscale's function holds the state as an attribute for the lifetime of the graph.
            self.states.append(state)
        with tape.no_grad():
            out = block.forward(tape, Tensor(x.storage)).storage
        saved = Storage(self.host, OFFLOADED, x.size) if offloaded else x.storage

        def backward(grad: Storage) -> tuple[Storage | None]:
            inner = Tape(tape.memory, tape.hooks)
            held = [state, tape.new(state_bytes, "random states")]
            # The backward of the block's last sum, which needs no saved tensor, has run before.
            cast_grad = tape.new(saved.size // self.stream.value * self.sizes.value if narrows else 0, GRADIENTS)
            inner.recomputes = not offload
            again = inner.leaf(tape.new(saved.size) if offloaded else saved)
            # torch's checkpoint stops once backward has what it needs; fairscale's holds the output.
            result = block.forward(inner, again, again=not offload)
            inner.stopped = False
            inner.casts.clear()
            del cast_grad
            last = result.node
            if offload:
                inner.outer = grad
                held.append(result.storage)
            else:
                held.pop()
            del result, again
            given = inner.backward(last, grad)
            del held
            return (given,)

        return tape.result(out, (x,), backward, (saved,))

    def loss(self, tape: Tape, inputs: Storage, targets: Storage) -> Tensor:
        """Return the mean cross-entropy of a micro-batch in fp32."""
        logits = self.forward(tape, inputs)
        if self.loss_kind == "chunked":
            return logits
        tape.memory.site = "loss"
        logits = cast(tape, logits, logits.size // self.sizes.value, self.sizes, replace(self.sizes, value=4))
        if self.loss_kind in ("mixed", "smoothed"):
            return mixed_cross_entropy(tape, logits, targets, smoothed=self.loss_kind == "smoothed")
        return cross_entropy(tape, logits, targets)


@dataclass(frozen=True, slots=True)
class Replay:
    """Result of a simulated forward and backward pass."""

    memory: MemoryTracker
    """The device's memory with the peaks, and with the events if they were recorded."""
    saved_bytes: int
    """Bytes on the device that are saved for backward when forward ends."""


OpenPhase = Callable[[str], AbstractContextManager[None]]
"""Returns a context manager that attributes its block to the phase of that name."""


def run_micro_batch(
    network: SimulatedNetwork, memory: MemoryTracker, hooks: ParameterHooks | None, phase: OpenPhase
) -> int:
    """Simulate forward and backward of one micro-batch, each as a phase.

    Args:
        network: the model.
        memory: the device's memory; what it holds already counts.
        hooks: the engine; None is training without ZeRO.
        phase: opens each phase.

    Returns:
        Bytes on the device that are saved for backward when forward ends.
    """
    tape = Tape(memory, hooks)
    inputs, targets = (tape.new(size, MICRO_BATCHES) for size in network.batch_bytes)
    with phase(Phase.FORWARD):
        loss = network.loss(tape, inputs, targets)
    saved_bytes = tape.saved_bytes()
    with phase(Phase.BACKWARD):
        tape.backward(loss.node, tape.new(4, GRADIENTS))
        tape.hooks.finish()
    network.states.clear()
    return saved_bytes


def run_evaluation_pass(network: SimulatedNetwork, memory: MemoryTracker, hooks: ParameterHooks | None) -> None:
    """Simulate the forward pass and the losses of one batch that is evaluated; nothing is saved for backward.

    Args:
        network: the model.
        memory: the device's memory; what it holds already counts.
        hooks: the engine; None is a network without ZeRO.
    """
    tape = Tape(memory, hooks)
    inputs, targets = (tape.new(size, MICRO_BATCHES) for size in network.batch_bytes)
    with tape.no_grad():
        loss = network.loss(tape, inputs, targets)
    del loss
    network.states.clear()


def forward_saved_bytes(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> int:
    """Bytes on the device that are saved for backward when the forward pass of one micro-batch ends.

    Args:
        spec: the model.
        batch: samples of the micro-batch.
        sizes: bytes per value.
        implementation: "grouped", or "gather" for the published operator.
    """
    network, tape = SimulatedNetwork(spec, batch, sizes, None, implementation), Tape(MemoryTracker(), None)
    inputs, targets = (tape.new(size, MICRO_BATCHES) for size in network.batch_bytes)
    loss = network.loss(tape, inputs, targets)
    saved = tape.saved_bytes()
    del loss
    return saved


def replay(
    spec: ModelSpec,
    batch: int,
    sizes: DtypeSizes,
    tile_relations: int | None = None,
    *,
    memory: MemoryTracker | None = None,
    hooks: ParameterHooks | None = None,
    implementation: Implementation = "grouped",
    loss: LossKind = "whole",
    share: GroupShare | None = None,
) -> Replay:
    """Simulate forward and backward of one micro-batch in one process.

    Args:
        spec: the model.
        batch: samples of the micro-batch.
        sizes: bytes per value.
        tile_relations: relations per tile; None for one tile per table.
        memory: the device's memory; what it holds already counts. None is an empty one.
        hooks: the engine; None is training without ZeRO.
        implementation: "grouped", or "gather" for the published operator.
        loss: how the loss is computed.
        share: the rank's part in a group that shares out the relations; None if it has all of them.
    """
    memory = MemoryTracker() if memory is None else memory
    network = SimulatedNetwork(spec, batch, sizes, tile_relations, implementation, loss=loss, share=share)
    saved_bytes = run_micro_batch(network, memory, hooks, memory.phase)
    return Replay(memory, saved_bytes)


def target_bytes(spec: ModelSpec, loss: LossKind = "whole") -> int:
    """Return the bytes of one sample's target: a class, class probabilities in fp32, or token ids."""
    if not isinstance(spec, PatchSpec):
        return spec.tokens * INDEX_BYTES
    return spec.classes * 4 if loss in ("mixed", "smoothed") else INDEX_BYTES


def sample_bytes(spec: ModelSpec, loss: LossKind = "whole") -> int:
    """Return the bytes of one sample's input and target: an fp32 image and its target, or token ids."""
    if isinstance(spec, PatchSpec):
        return prod(spec.sample_shape) * IMAGE_BYTES + target_bytes(spec, loss)
    return 2 * spec.tokens * INDEX_BYTES
