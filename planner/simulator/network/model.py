"""One training step replayed: the networks of models/ as twins that allocate what those allocate.

Source: models/networks.py; a block is in block_twin.py, what torch's own operations allocate in
twins.py, the relation operator in relation_twin.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from ...common.errors import InputError
from ...common.phases import Phase
from ...config.model import GptSpec, ModelSpec, VitSpec
from ..core.autograd import ModuleParams, ParameterHooks, Tape, Tensor
from ..core.storage import MemoryTracker, Storage
from .block import SimulatedBlock, linear_weights
from .ops import (
    GRADIENTS,
    INDEX_BYTES,
    DtypeSizes,
    add_positions,
    cast,
    cross_entropy,
    dropout,
    embed,
    layer_norm,
    linear,
    pool_first,
    pool_mean,
    prepend,
)
from .relation_shape import Implementation

RANDOM_STATE_BYTES = 5056
"""The state of torch's random numbers on a CPU, which a checkpoint restores."""
OFFLOADED = "offloaded activations"
MICRO_BATCHES = "micro-batches"


class SimulatedNetwork:
    """A whole network and its loss.

    Args:
        spec: the model.
        batch: samples of a micro-batch.
        w: widths of values.
        tile_relations: relations per tile; None keeps tables whole.
        implementation: of relation tables.
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        sizes: DtypeSizes,
        tile_relations: int | None = None,
        implementation: Implementation = "grouped",
    ) -> None:
        self.spec, self.batch, self.sizes = spec, batch, sizes
        self.host = MemoryTracker()
        self.states: list[Storage] = []
        if sizes.casts and spec.checkpointing == "offload":
            # fairscale computes again outside autocast on a CPU, and in fp16 on a GPU.
            raise InputError("checkpointing: offload is not allowed: must be none or block under autocast")
        # What stands between blocks: autocast widens what is joined or added to a parameter.
        self.embedded = sizes if isinstance(spec, VitSpec) and sizes.device == "cpu" else sizes.wide
        widened = spec.learned_positions or (isinstance(spec, VitSpec) and spec.class_token)
        self.stream = sizes.wide if widened else self.embedded
        self.blocks = [
            SimulatedBlock(spec, operator, tile_relations, batch, sizes, implementation, self.stream)
            for operator in spec.layer_operators
        ]
        dim = spec.dim
        self.embedding: tuple[ModuleParams, ...]
        if isinstance(spec, VitSpec):
            self.embedding = (
                ModuleParams((spec.patch_dim,) * 2),
                linear_weights(spec.patch_dim, dim),
                ModuleParams((dim, dim)),
            )
            self.head = linear_weights(dim, spec.classes)
        else:
            self.embedding = (ModuleParams((spec.vocabulary * dim,)),)
            self.head = linear_weights(dim, spec.vocabulary, bias=False)
        self.class_token = ModuleParams((dim,))
        self.positions = ModuleParams((spec.tokens * dim,)) if spec.learned_positions else None
        self.norm, self.head_norm = ModuleParams((dim, dim)), ModuleParams((dim, dim))

    @property
    def modules(self) -> list[ModuleParams]:
        """The parameters of each module, in the order in which torch walks the modules."""
        learned = [self.class_token] if isinstance(self.spec, VitSpec) and self.spec.class_token else []
        learned += [self.positions] if self.positions is not None else []
        ends = [self.norm] if isinstance(self.spec, VitSpec) else [self.norm, self.head_norm]
        blocks = [weights for block in self.blocks for weights in block.modules]
        return [*self.embedding, *learned, *blocks, *ends, self.head]

    @property
    def construction(self) -> list[ModuleParams]:
        """The same in the order in which they are made: all operators first."""
        operators = [weights for block in self.blocks for weights in block.construction]
        made = set(map(id, operators))
        return operators + [weights for weights in self.modules if id(weights) not in made]

    @property
    def buffer_bytes(self) -> int:
        """Cosines and sines of the layers that turn by rotary embedding, and a GPU's index lists of pairs.

        The lists are kept once for all layers: queries, keys and places of pairs, and slots of both sides.
        """
        spec = self.spec
        turning = sum(
            spec.rotary_attention if operator == "attention" else spec.rotary for operator in spec.layer_operators
        )
        grouped = {"translution", "alpha"} & set(spec.layer_operators) and self.sizes.batched
        lists = spec.geometry.total_pairs * 7 * INDEX_BYTES if grouped else 0
        return turning * spec.tokens * spec.head_dim * self.sizes.parameter + lists

    @property
    def input_bytes(self) -> int:
        """An image batch in the parameters' dtype, or token numbers."""
        if isinstance(self.spec, VitSpec):
            return self.batch * self.spec.channels * self.spec.image[0] * self.spec.image[1] * self.sizes.parameter
        return self.batch * self.spec.tokens * INDEX_BYTES

    def _embed(self, tape: Tape, inputs: Storage) -> Tensor:
        spec, sizes, batch = self.spec, self.sizes, self.batch
        tape.memory.site = "embedding"
        if isinstance(spec, GptSpec):
            return embed(tape, batch * spec.tokens, spec.dim, self.embedding[0], inputs, sizes.wide)
        patches = batch * spec.geometry.patches
        x = Tensor(tape.new(patches * spec.patch_dim * sizes.parameter))
        x = layer_norm(tape, x, patches, spec.patch_dim, self.embedding[0], sizes.wide)
        x = linear(tape, x, patches, spec.patch_dim, spec.dim, self.embedding[1], sizes, given=sizes.wide)
        # On a GPU autocast norms in fp32.
        x = cast(tape, x, patches * spec.dim, sizes, self.embedded)
        copies = patches * spec.dim * sizes.value if spec.class_token and not sizes.casts else 0
        return layer_norm(tape, x, patches, spec.dim, self.embedding[2], self.embedded, copies=copies)

    def forward(self, tape: Tape, inputs: Storage) -> Tensor:
        """The logits of a micro-batch."""
        logits = self._forward(tape, inputs)
        # Autocast's context ends with the network's forward.
        tape.casts.clear()
        return logits

    def _forward(self, tape: Tape, inputs: Storage) -> Tensor:
        spec, sizes, batch, stream = self.spec, self.sizes, self.batch, self.stream
        rows = batch * spec.tokens
        x, given = self._embed(tape, inputs), self.embedded
        if isinstance(spec, VitSpec) and spec.class_token:
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
        x = layer_norm(tape, x, rows, spec.dim, self.norm, stream)
        if isinstance(spec, VitSpec):
            size = batch * spec.dim * stream.value
            pooled = pool_first(tape, x) if spec.pool == "class" else pool_mean(tape, x, size, stream)
            return linear(tape, pooled, batch, spec.dim, spec.classes, self.head, sizes, given=stream)
        x = layer_norm(tape, x, rows, spec.dim, self.head_norm, stream)
        return linear(tape, x, rows, spec.dim, spec.vocabulary, self.head, sizes, given=stream)

    def _checkpointed(self, tape: Tape, block: SimulatedBlock, x: Tensor) -> Tensor:
        """A block that keeps its input alone, and runs again in backward to be remembered."""
        spec = self.spec
        offload = spec.checkpointing == "offload"
        offloaded = offload and self.sizes.device != "cpu"
        narrows = self.stream.value != self.sizes.value
        state_bytes = RANDOM_STATE_BYTES if self.sizes.device == "cpu" else 0
        state = tape.new(state_bytes, "random states")
        if offload:
            # fairscale's function holds it as an attribute, for as long as the graph lives.
            self.states.append(state)
        with tape.no_grad():
            out = block.forward(tape, Tensor(x.storage)).storage
        kept = Storage(self.host, OFFLOADED, x.size) if offloaded else x.storage

        def backward(grad: Storage) -> tuple[Storage | None]:
            inner = Tape(tape.memory, tape.hooks)
            held = [state, tape.new(state_bytes, "random states")]
            # The last sum's backward, which needs nothing that was kept, has run before.
            cast_grad = tape.new(kept.size // self.stream.value * self.sizes.value if narrows else 0, GRADIENTS)
            again = inner.leaf(tape.new(kept.size) if offloaded else kept)
            # torch's own checkpoint stops where nothing more is needed; fairscale's holds the output.
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

        return tape.result(out, (x,), backward, (kept,))

    def loss(self, tape: Tape, inputs: Storage, targets: Storage) -> Tensor:
        """The mean cross-entropy of a micro-batch, in fp32."""
        logits = self.forward(tape, inputs)
        tape.memory.site = "loss"
        logits = cast(tape, logits, logits.size // self.sizes.value, self.sizes, replace(self.sizes, value=4))
        return cross_entropy(tape, logits, targets)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replayed step left."""

    memory: MemoryTracker
    """Its peaks, and its events where they were recorded."""
    saved_bytes: int
    """Kept for backward when forward ends, on the device itself."""


OpenPhase = Callable[[str], AbstractContextManager[None]]
"""Opens a phase of the step by its name."""


def run_micro_batch(
    network: SimulatedNetwork, memory: MemoryTracker, hooks: ParameterHooks | None, phase: OpenPhase
) -> int:
    """Forward and backward of one micro-batch, as phases of those names.

    Args:
        network: the model.
        memory: of the device; what it holds already counts.
        policy: how parameters lie.
        phase: opens each phase.

    Returns:
        Bytes kept for backward when forward ends, on the device itself.
    """
    tape, spec = Tape(memory, hooks), network.spec
    inputs = tape.new(network.input_bytes, MICRO_BATCHES)
    outputs = network.batch * (spec.tokens if isinstance(spec, GptSpec) else 1)
    targets = tape.new(outputs * INDEX_BYTES, MICRO_BATCHES)
    with phase(Phase.FORWARD):
        loss = network.loss(tape, inputs, targets)
    kept = tape.saved_bytes()
    with phase(Phase.BACKWARD):
        tape.backward(loss.node, tape.new(4, GRADIENTS))
        tape.hooks.finish()
    network.states.clear()
    return kept


def replay(
    spec: ModelSpec,
    batch: int,
    sizes: DtypeSizes,
    tile_relations: int | None = None,
    *,
    memory: MemoryTracker | None = None,
    hooks: ParameterHooks | None = None,
    implementation: Implementation = "grouped",
) -> Replay:
    """Forward and backward of one micro-batch on one process, without ZeRO unless the policy is another.

    Args:
        spec: the model.
        batch: samples.
        w: widths of values.
        tile_relations: relations per tile; None keeps tables whole.
        memory: where to allocate; what it holds already counts.
        policy: how parameters lie.
        implementation: "grouped", or "gather" for the published way.
    """
    memory = MemoryTracker() if memory is None else memory
    network = SimulatedNetwork(spec, batch, sizes, tile_relations, implementation)
    kept = run_micro_batch(network, memory, hooks, memory.phase)
    return Replay(memory, kept)


def sample_bytes(spec: ModelSpec) -> int:
    """Bytes of one sample's input and target: an fp32 image and its class, or token numbers."""
    if isinstance(spec, VitSpec):
        return spec.channels * spec.image[0] * spec.image[1] * 4 + INDEX_BYTES
    return 2 * spec.tokens * INDEX_BYTES
