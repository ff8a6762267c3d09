"""Simulation of one block of the networks: its operator and its feed-forward network.

Source: models/networks/blocks.py and models/layers/, module by module.
"""

from __future__ import annotations

from ...config.model import ModelSpec
from ...config.model_base import Operator
from ...costs.parameters import table_tiles
from ..core import ModuleParams, Storage, Tape, Tensor
from .attention_ops import fused_attention, rotate
from .gather_ops import SimulatedGather, positions
from .group_ops import SimulatedGroupRelations
from .group_share import GroupShare
from .norm_ops import norm
from .ops import (
    GRADIENTS,
    DtypeSizes,
    add,
    add_narrow,
    cast,
    dropout,
    gelu,
    linear,
    multiply,
)
from .relation_ops import SimulatedRelations
from .relation_shape import Implementation, RelationShape, SimulatedTerm, SimulatedTile, shared_shape

_ROLES = {"q": "query", "k": "key", "v": "value"}
_PLAIN = ("plain_query", "plain_key", "plain_value")


def linear_weights(d_in: int, d_out: int, *, bias: bool = True) -> ModuleParams:
    """Return the parameters of a linear layer."""
    return ModuleParams(
        (d_out * d_in, d_out) if bias else (d_out * d_in,), lengths=(d_out, d_out) if bias else (d_out,)
    )


def norm_weights(spec: ModelSpec, width: int) -> ModuleParams:
    """Return the parameters of a norm over ``width`` values."""
    return ModuleParams((width,) * spec.norm_tensors)


class SimulatedBlock:
    """A pre-norm block with its operator and feed-forward network.

    Args:
        spec: the model.
        operator: the operator of this layer.
        tile_relations: relations per tile; None for one tile per table.
        batch: samples of the micro-batch.
        sizes: bytes per value.
        implementation: of relation tables.
        stream: sizes of the values between blocks, if autocast makes them differ.
        share: the rank's part in a group that shares out the relations; None if it has all of them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        operator: Operator,
        tile_relations: int | None,
        batch: int,
        sizes: DtypeSizes,
        implementation: Implementation = "grouped",
        stream: DtypeSizes | None = None,
        share: GroupShare | None = None,
    ) -> None:
        self.spec, self.operator, self.batch, self.sizes, self.implementation = (
            spec,
            operator,
            batch,
            sizes,
            implementation,
        )
        self.stream, self.share = sizes if stream is None else stream, share
        self.mask_of = spec.geometry if spec.attention_mask else None
        self.rows = batch * spec.tokens
        dim, inner = spec.dim, spec.inner_dim
        self.norms = (norm_weights(spec, dim), norm_weights(spec, dim))
        self.gate = linear_weights(dim, spec.ffn_dim, bias=spec.bias) if spec.ffn == "swiglu" else None
        self.up = linear_weights(dim, spec.ffn_dim, bias=spec.bias)
        self.down = linear_weights(spec.ffn_dim, dim, bias=spec.bias)
        self.output = linear_weights(inner, dim, bias=spec.bias) if spec.has_output_projection else None
        self.plain = {role: linear_weights(dim, inner, bias=False) for role in "qkv"}
        self.kv_dim = spec.kv_dim if operator == "attention" else inner
        self.joint = linear_weights(dim, inner + 2 * self.kv_dim, bias=False)
        self.terms: list[SimulatedTerm] = []
        self.logit_tiles: list[SimulatedTile] = []
        self.value_tiles: list[SimulatedTile] = []
        relations = spec.geometry.relations
        if operator == "bias":
            self.terms = [SimulatedTerm("bias", ModuleParams((relations * spec.heads,)))]
        elif operator == "shaw":
            self.terms = [SimulatedTerm(kind, ModuleParams((relations * spec.head_dim,))) for kind in ("key", "value")]
        if operator in ("translution", "alpha"):
            self._make_tables(tile_relations)
        else:
            self.shape = self._shape(0, spec.inner_dim)
        if operator == "absolute":
            numbers = [n for n, copies in table_tiles(spec.tokens, tile_relations) for _ in range(copies)]
            self.positions = {
                role: [(n, ModuleParams((n * dim * inner,), lengths=(n,))) for n in numbers] for role in spec.roles
            }

    @property
    def modules(self) -> list[ModuleParams]:
        """The parameters of each module, in the order of ``Module.modules()``."""
        gate = [] if self.gate is None else [self.gate]
        return [self.norms[0], *self.operator_modules, self.norms[1], *gate, self.up, self.down]

    @property
    def operator_modules(self) -> list[ModuleParams]:
        """The parameters of each module of the operator."""
        spec = self.spec
        output = [self.output] if self.output is not None else []
        if self.operator in ("attention", "bias", "shaw"):
            return [*(term.weights for term in self.terms), *output, self.joint]
        plain = [self.plain[role] for role in "qkv" if role not in spec.roles]
        if self.operator == "absolute":
            return [*output, *plain, *(weights for role in spec.roles for _, weights in self.positions[role])]
        tiles = [tile.weights for tile in (*self.logit_tiles, *self.value_tiles)]
        if self.operator == "translution":
            return [*plain, *tiles, *output]
        low = [weights for _, weights in self.low.values()]
        return [self.joint, *low, *tiles, *([self.low_output] if "v" in spec.roles else []), *output]

    @property
    def construction(self) -> list[ModuleParams]:
        """The parameters of the operator's modules in the order of construction: tiles by their first relation."""
        tiles = sorted((*self.logit_tiles, *self.value_tiles), key=lambda tile: tile.first)
        own, made = {id(tile.weights) for tile in tiles}, iter(tiles)
        return [next(made).weights if id(weights) in own else weights for weights in self.operator_modules]

    def _shape(self, d_in: int, d_out: int) -> RelationShape:
        spec = self.spec
        return shared_shape(
            RelationShape(spec.geometry, self.batch, spec.heads, d_in, d_out, spec.inner_dim, self.sizes, spec.dropout)
        )

    def _make_tables(self, tile_relations: int | None) -> None:
        spec = self.spec
        d_in, d_out = (spec.dim, spec.inner_dim) if self.operator == "translution" else spec.low_dims
        self.shape = self._shape(d_in, d_out)
        geometry = spec.geometry if self.share is None else self.share.owned
        numbers = [n for n, copies in table_tiles(geometry.relations, tile_relations) for _ in range(copies)]
        both = len(set("qk") & set(spec.roles))
        first = 0
        for count in numbers:
            numel = count * d_in * d_out
            if both:
                weights = ModuleParams((numel,) * both, lengths=(count,) * both)
                self.logit_tiles.append(SimulatedTile(first, count, weights))
            if "v" in spec.roles:
                self.value_tiles.append(SimulatedTile(first, count, ModuleParams((numel,), lengths=(count,))))
            first += count
        low1, low2 = d_in, d_out
        coupled = bool(both)
        low_widths = {role: low1 if role in spec.roles else low2 for role in "qk" if coupled}
        if "v" in spec.roles:
            low_widths["v"] = low1
        self.low = {role: (width, linear_weights(spec.dim, width, bias=False)) for role, width in low_widths.items()}
        self.low_output = linear_weights(low2, spec.inner_dim, bias=False)

    def forward(self, tape: Tape, x: Tensor, *, again: bool = False) -> Tensor:
        """Run the block, (rows, C) → (rows, C).

        Args:
            tape: records the operations.
            x: the input.
            again: recompute only what backward needs, as torch's checkpoint does.
        """
        # Calls are nested as in the layers: a local name would keep an intermediate tensor alive.
        sizes = (self.stream, self.sizes)
        x = add_narrow(tape, x, self._drop(tape, self._operator(tape, self._norm(tape, x, 0))), *sizes)
        return add_narrow(
            tape, x, self._drop(tape, self._feed_forward(tape, self._norm(tape, x, 1), again), last=again), *sizes
        )

    def _norm(self, tape: Tape, x: Tensor, number: int) -> Tensor:
        return norm(tape, x, self.rows, self.spec.dim, self.norms[number], self.stream, self.spec)

    def _linear(self, tape: Tape, x: Tensor, d_out: int, weights: ModuleParams) -> Tensor:
        """Multiply the normed input by a weight; autocast casts the input for each product."""
        return linear(tape, x, self.rows, self.spec.dim, d_out, weights, self.sizes, given=self.stream)

    def _drop(self, tape: Tape, x: Tensor, *, last: bool = False) -> Tensor:
        return dropout(tape, x, self.sizes, last=last) if self.spec.dropout else x

    def _feed_forward(self, tape: Tape, x: Tensor, again: bool) -> Tensor:
        spec, rows, sizes = self.spec, self.rows, self.sizes
        tape.memory.site = "feed-forward"
        if self.gate is None:
            hidden = self._drop(tape, gelu(tape, self._linear(tape, x, spec.ffn_dim, self.up)))
        else:
            active = gelu(tape, self._linear(tape, x, spec.ffn_dim, self.gate))
            product = multiply(tape, active, self._linear(tape, x, spec.ffn_dim, self.up))
            del active
            hidden = self._drop(tape, product)
            del product
        last = again and not spec.dropout
        return linear(tape, hidden, rows, spec.ffn_dim, spec.dim, self.down, sizes, last=last)

    def _operator(self, tape: Tape, x: Tensor) -> Tensor:
        tape.memory.site = self.operator
        operators = {
            "attention": self._attention,
            "translution": self._translution,
            "alpha": self._alpha,
            "bias": self._with_terms,
            "shaw": self._with_terms,
            "absolute": self._absolute,
        }
        return operators[self.operator](tape, x)

    def _project(self, tape: Tape, x: Tensor) -> Tensor:
        if self.output is None:
            return x
        return linear(tape, x, self.rows, self.spec.inner_dim, self.spec.dim, self.output, self.sizes)

    def _attention(self, tape: Tape, x: Tensor) -> Tensor:
        spec, sizes = self.spec, self.sizes
        grouped = self.kv_dim < spec.inner_dim
        if spec.dropout and not spec.rotary_attention and not grouped:
            return self._with_terms(tape, x)
        projected = self._linear(tape, x, spec.inner_dim + 2 * self.kv_dim, self.joint)
        one, shared = (self.rows * width * sizes.value for width in (spec.inner_dim, self.kv_dim))
        rows = _split(tape, projected, (one, shared, shared), copies=False, by_heads=True)
        for n in (0, 1) if spec.rotary_attention else ():
            rows[n] = rotate(tape, rows[n], (one, shared)[n] // sizes.value, sizes)
        if spec.dropout:
            result = self._attend(tape, dict(zip(_PLAIN, self._by_token(tape, rows, one, shared), strict=True)))
            del rows, projected
            return result
        kv_heads = self.kv_dim // spec.head_dim
        shape = (self.batch, spec.tokens, spec.heads, spec.head_dim)
        out = joined = fused_attention(tape, rows, *shape, sizes, kv_heads, mask_of=self.mask_of)
        if spec.rotary_attention and spec.heads > 1 and spec.tokens > 1:
            # The kernel's output for rotated queries is ordered by heads; joining the heads copies it.
            joined = tape.result(tape.new(one), (out,), lambda grad: (grad,))
        result = self._project(tape, joined)
        # The layer's local names hold these until it returns.
        del rows, projected, out
        return result

    def _by_token(self, tape: Tape, rows: list[Tensor], one: int, shared: int) -> list[Tensor]:
        """Return queries, keys and values of all heads, contiguous by token."""
        spec = self.spec
        if shared < one:
            # Keys and values are repeated for the heads of queries that share them.
            for n in (1, 2):
                rows[n] = tape.result(tape.new(one), (rows[n],), lambda grad: (tape.new(shared, GRADIENTS),))
        # With one head the rotated rows are contiguous by token already.
        copied = [spec.heads > 1 or (n == 2 and shared == one) for n in range(3)]
        return [
            tape.result(tape.new(one) if copy else row.storage, (row,), lambda grad: (grad,))
            for row, copy in zip(rows, copied, strict=True)
        ]

    def _attend(self, tape: Tape, sources: dict[str, Tensor]) -> Tensor:
        """Run projected rows through the operator and the output projection."""
        relative, plain = SimulatedRelations(tape, self.shape, dict(sources), [], [], self.terms).forward()
        assert plain is not None
        out = plain if relative is None else add(tape, plain, relative)
        del relative, plain
        return self._project(tape, out)

    def _with_terms(self, tape: Tape, x: Tensor) -> Tensor:
        joint = self._linear(tape, x, 3 * self.spec.inner_dim, self.joint)
        one = self.rows * self.spec.inner_dim * self.sizes.value
        return self._attend(tape, dict(zip(_PLAIN, _split(tape, joint, (one,) * 3), strict=True)))

    def _absolute(self, tape: Tape, x: Tensor) -> Tensor:
        spec, sizes = self.spec, self.sizes
        names = {"q": "plain_query", "k": "plain_key", "v": "plain_value"}
        rows = {}
        for role in "qkv":
            if role in spec.roles:
                numbers = (self.batch, spec.dim, spec.inner_dim)
                rows[names[role]] = positions(tape, x, *numbers, self.positions[role], sizes, self.stream)
            else:
                rows[names[role]] = self._linear(tape, x, spec.inner_dim, self.plain[role])
        if spec.dropout:
            return self._attend(tape, rows)
        shape = (self.batch, spec.tokens, spec.heads, spec.head_dim)
        out = fused_attention(tape, list(rows.values()), *shape, sizes, mask_of=self.mask_of)
        return self._project(tape, out)

    def _relate(self, tape: Tape, sources: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Run the operator with its relation tables."""
        sources, relative = dict(sources), [_ROLES[role] for role in self.spec.roles]
        if self.operator == "translution":
            # Autocast casts each source, even if several are the same tensor; in a group it casts them once.
            once: Tensor | None = None
            for name in relative:
                if once is None or self.share is None:
                    once = cast(tape, sources[name], self.rows * self.spec.dim, self.stream, self.sizes)
                sources[name] = once
            del once
        if self.share is not None:
            group = SimulatedGroupRelations(tape, self.shape, sources, self.logit_tiles, self.value_tiles, self.share)
            del sources
            return group.forward()
        if self.implementation == "grouped":
            grouped = SimulatedRelations(tape, self.shape, sources, self.logit_tiles, self.value_tiles)
            del sources
            return grouped.forward()
        gathered = SimulatedGather(tape, self.shape, sources, relative, self.logit_tiles, self.value_tiles)
        del sources
        return gathered.forward()

    def _translution(self, tape: Tape, x: Tensor) -> Tensor:
        spec = self.spec
        rows = {
            role: x if role in spec.roles else self._linear(tape, x, spec.inner_dim, self.plain[role]) for role in "qkv"
        }
        if self.logit_tiles:
            sources = {"query": rows["q"], "key": rows["k"]}
        else:
            sources = {"plain_query": rows["q"], "plain_key": rows["k"]}
        sources["value" if "v" in spec.roles else "plain_value"] = rows["v"]
        relative, plain = self._relate(tape, sources)
        out = relative if relative is not None else plain
        assert out is not None
        return self._project(tape, out)

    def _plain_parts(self, tape: Tape, joint: Tensor) -> list[Tensor]:
        """Return plain queries, keys and values; the grouped operator copies views."""
        size = self.rows * self.spec.inner_dim * self.sizes.value
        copies = self.implementation == "grouped"
        if not self.spec.rotary:
            return _split(tape, joint, (size,) * 3, copies=copies)
        parts = _split(tape, joint, (size,) * 3, copies=False)
        for n in (0, 1):
            parts[n] = rotate(tape, parts[n], size // self.sizes.value, self.sizes)
            if self.spec.heads > 1:
                # A copy that is contiguous by token again.
                rotated = parts.pop(n)
                parts.insert(n, tape.result(tape.new(size), (rotated,), lambda grad: (tape.new(size, GRADIENTS),)))
                del rotated
        if copies:
            parts[2] = tape.result(tape.new(size), (parts[2],), lambda grad: (grad,))
        return parts

    def _alpha(self, tape: Tape, x: Tensor) -> Tensor:
        spec, sizes, n = self.spec, self.sizes, self.rows
        joint = self._linear(tape, x, 3 * spec.inner_dim, self.joint)
        lows = {role: self._linear(tape, x, width, weights) for role, (width, weights) in self.low.items()}
        parts = self._plain_parts(tape, joint)
        # The layer's local names hold rotated queries and keys until it returns.
        rotated = parts[:2] if spec.rotary else []
        sources = dict(zip(_PLAIN, parts, strict=True)) | {_ROLES[role]: low for role, low in lows.items()}
        del parts
        relative, plain = self._relate(tape, sources)
        assert plain is not None
        del sources
        if relative is not None:
            up = linear(tape, relative, n, self.shape.d_out, spec.inner_dim, self.low_output, sizes)
            total = add(tape, plain, up)
            plain = tape.result(tape.new(total.size), (total,), lambda grad: (tape.new(grad.size, GRADIENTS),))
            del total, up
        out = self._project(tape, plain)
        del rotated
        return out


def _split(
    tape: Tape, joint: Tensor, sizes: tuple[int, ...], *, copies: bool = True, by_heads: bool = False
) -> list[Tensor]:
    """Split a tensor into parts, as contiguous copies or as views; backward joins their gradients.

    Args:
        tape: records the operation.
        joint: the tensor.
        sizes: bytes of each part.
        copies: whether the parts are copied.
        by_heads: whether the parts are views by heads; backward then reorders the joined gradient in a copy.
    """
    received: list[Storage] = []

    def join(grad: Storage) -> tuple[Storage]:
        joined = tape.new(sum(sizes), GRADIENTS)
        received.clear()
        return (tape.new(sum(sizes), GRADIENTS) if by_heads else joined,)

    parts = tape.result(joint.storage, (joint,), join)

    def receive(grad: Storage) -> tuple[Storage]:
        received.append(grad)
        return (grad,)

    return [tape.result(tape.new(one) if copies else joint.storage, (parts,), receive) for one in sizes]
