"""Twin of a block of the networks: its operator, whichever it is, and its feed-forward network.

Source: models/networks.py, models/layers.py and models/attention.py, module by module.
"""

from __future__ import annotations

from .model_spec import ModelSpec, Operator
from .parameters import table_tiles
from .relation_shape import RelationShape, TermTwin, TileTwin, largest_rectangle
from .relation_twin import RelationTwin
from .tape import Storage, Tape, Tensor, Weights
from .twins import (
    GRADIENTS,
    TEMPORARY,
    Widths,
    add,
    dropout,
    fused_attention,
    gelu,
    layer_norm,
    linear,
    positions,
    separate_attention,
)


def linear_weights(d_in: int, d_out: int, *, bias: bool = True) -> Weights:
    """The parameters of a linear layer."""
    return Weights((d_out * d_in, d_out) if bias else (d_out * d_in,))


class BlockTwin:
    """A pre-norm block with its operator and feed-forward network.

    Args:
        spec: sizes.
        operator: of this layer.
        tile_relations: relations per tile; None keeps tables whole.
        batch: samples of a micro-batch.
        w: widths of values.
    """

    def __init__(self, spec: ModelSpec, operator: Operator, tile_relations: int | None, batch: int, w: Widths) -> None:
        self.spec, self.operator, self.batch, self.w = spec, operator, batch, w
        self.rows = batch * spec.tokens
        dim, inner = spec.dim, spec.inner_dim
        self.norms = (Weights((dim, dim)), Weights((dim, dim)))
        self.up, self.down = linear_weights(dim, spec.ffn_dim), linear_weights(spec.ffn_dim, dim)
        self.output = linear_weights(inner, dim) if spec.has_output_projection else None
        self.plain = {role: linear_weights(dim, inner, bias=False) for role in "qkv"}
        self.joint = linear_weights(dim, 3 * inner, bias=False)
        self.terms: list[TermTwin] = []
        self.logit_tiles: list[TileTwin] = []
        self.value_tiles: list[TileTwin] = []
        relations = spec.geometry.relations
        if operator == "bias":
            self.terms = [TermTwin("bias", Weights((relations * spec.heads,)))]
        elif operator == "shaw":
            self.terms = [TermTwin(kind, Weights((relations * spec.head_dim,))) for kind in ("key", "value")]
        if operator in ("translution", "alpha"):
            self._make_tables(tile_relations)
        else:
            self.shape = self._shape(0, spec.inner_dim)
        if operator == "absolute":
            sizes = [n for n, copies in table_tiles(spec.tokens, tile_relations) for _ in range(copies)]
            self.positions = {role: [(n, Weights((n * dim * inner,))) for n in sizes] for role in spec.roles}

    @property
    def modules(self) -> list[Weights]:
        """The parameters of each module, in the order in which torch walks the block's modules."""
        return [self.norms[0], *self.operator_modules, self.norms[1], self.up, self.down]

    @property
    def operator_modules(self) -> list[Weights]:
        """Those of the operator alone."""
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

    def _shape(self, d_in: int, d_out: int) -> RelationShape:
        spec = self.spec
        return RelationShape(spec.geometry, self.batch, spec.heads, d_in, d_out, spec.inner_dim, self.w, spec.dropout)

    def _make_tables(self, tile_relations: int | None) -> None:
        spec = self.spec
        d_in, d_out = (spec.dim, spec.inner_dim) if self.operator == "translution" else spec.low_dims
        self.shape = self._shape(d_in, d_out)
        sizes = [n for n, copies in table_tiles(spec.geometry.relations, tile_relations) for _ in range(copies)]
        both = len(set("qk") & set(spec.roles))
        first = 0
        for count in sizes:
            numel = count * d_in * d_out
            rectangle = largest_rectangle(spec.geometry, first, count)
            if both:
                self.logit_tiles.append(TileTwin(first, count, Weights((numel,) * both), rectangle))
            if "v" in spec.roles:
                self.value_tiles.append(TileTwin(first, count, Weights((numel,)), rectangle))
            first += count
        low1, low2 = d_in, d_out
        coupled = bool(both)
        widths = {role: low1 if role in spec.roles else low2 for role in "qk" if coupled}
        if "v" in spec.roles:
            widths["v"] = low1
        self.low = {role: (width, linear_weights(spec.dim, width, bias=False)) for role, width in widths.items()}
        self.low_output = linear_weights(low2, spec.inner_dim, bias=False)

    def forward(self, tape: Tape, x: Tensor) -> Tensor:
        """(rows, C) → (rows, C)."""
        spec, rows, w = self.spec, self.rows, self.w
        out = self._operator(tape, layer_norm(tape, x, rows, spec.dim, self.norms[0], w))
        x = add(tape, x, self._drop(tape, out))
        del out
        out = self._feed_forward(tape, layer_norm(tape, x, rows, spec.dim, self.norms[1], w))
        return add(tape, x, self._drop(tape, out))

    def _drop(self, tape: Tape, x: Tensor) -> Tensor:
        return dropout(tape, x, self.w) if self.spec.dropout else x

    def _feed_forward(self, tape: Tape, x: Tensor) -> Tensor:
        spec, rows, w = self.spec, self.rows, self.w
        tape.memory.moment = "feed-forward"
        # Nested as the layers call each other: a name would keep the hidden layer alive.
        hidden = self._drop(tape, gelu(tape, linear(tape, x, rows, spec.dim, spec.ffn_dim, self.up, w)))
        return linear(tape, hidden, rows, spec.ffn_dim, spec.dim, self.down, w)

    def _operator(self, tape: Tape, x: Tensor) -> Tensor:
        tape.memory.moment = self.operator
        twins = {
            "attention": self._attention,
            "translution": self._translution,
            "alpha": self._alpha,
            "bias": self._with_terms,
            "shaw": self._with_terms,
            "absolute": self._absolute,
        }
        return twins[self.operator](tape, x)

    def _project(self, tape: Tape, x: Tensor) -> Tensor:
        if self.output is None:
            return x
        return linear(tape, x, self.rows, self.spec.inner_dim, self.spec.dim, self.output, self.w)

    def _attention(self, tape: Tape, x: Tensor) -> Tensor:
        spec, w = self.spec, self.w
        if spec.dropout and not spec.rotary_attention:
            return self._with_terms(tape, x)
        projected = linear(tape, x, self.rows, spec.dim, 3 * spec.inner_dim, self.joint, w)
        turned = None
        if spec.rotary_attention:
            turned = self._turn(tape)
            if spec.dropout:
                one = self.rows * spec.inner_dim * w.value
                names = ("plain_query", "plain_key", "plain_value")
                joined = tape.result(turned, (projected,), lambda grad: (grad,))
                del turned
                return self._attend(tape, dict(zip(names, _split(tape, joined, one), strict=True)))
        out = fused_attention(tape, projected, turned, self.batch, spec.tokens, spec.heads, spec.head_dim, w)
        if turned is not None:
            # The kernel gives turned queries' output by heads; joined again it is a copy.
            size = out.size
            out = tape.result(tape.new(size), (out,), lambda grad: (grad,))
        del projected, turned
        return self._project(tape, out)

    def _attend(self, tape: Tape, sources: dict[str, Tensor]) -> Tensor:
        """Projected rows through the operator's chain, and the output projection."""
        relative, plain = RelationTwin(tape, self.shape, dict(sources), [], [], self.terms).forward()
        assert plain is not None
        out = plain if relative is None else add(tape, plain, relative)
        del relative, plain
        return self._project(tape, out)

    def _with_terms(self, tape: Tape, x: Tensor) -> Tensor:
        joint = linear(tape, x, self.rows, self.spec.dim, 3 * self.spec.inner_dim, self.joint, self.w)
        one = self.rows * self.spec.inner_dim * self.w.value
        names = ("plain_query", "plain_key", "plain_value")
        return self._attend(tape, dict(zip(names, _split(tape, joint, one), strict=True)))

    def _absolute(self, tape: Tape, x: Tensor) -> Tensor:
        spec, w = self.spec, self.w
        names = {"q": "plain_query", "k": "plain_key", "v": "plain_value"}
        rows = {}
        for role in "qkv":
            if role in spec.roles:
                rows[names[role]] = positions(tape, x, self.batch, spec.dim, spec.inner_dim, self.positions[role], w)
            else:
                rows[names[role]] = linear(tape, x, self.rows, spec.dim, spec.inner_dim, self.plain[role], w)
        if spec.dropout:
            return self._attend(tape, rows)
        out = separate_attention(tape, list(rows.values()), self.batch, spec.tokens, spec.heads, spec.head_dim, w)
        return self._project(tape, out)

    def _turn(self, tape: Tape) -> Storage:
        one = self.rows * self.spec.inner_dim * self.w.accumulator
        first = tape.new(one * self.w.value // self.w.accumulator)
        tape.new(2 * one, TEMPORARY)
        second = tape.new(first.size)
        del first, second
        return tape.new(2 * one * self.w.value // self.w.accumulator)

    def _translution(self, tape: Tape, x: Tensor) -> Tensor:
        spec = self.spec
        rows = {
            role: x
            if role in spec.roles
            else linear(tape, x, self.rows, spec.dim, spec.inner_dim, self.plain[role], self.w)
            for role in "qkv"
        }
        if self.logit_tiles:
            sources = {"query": rows["q"], "key": rows["k"]}
        else:
            sources = {"plain_query": rows["q"], "plain_key": rows["k"]}
        sources["value" if "v" in spec.roles else "plain_value"] = rows["v"]
        relative, plain = RelationTwin(tape, self.shape, sources, self.logit_tiles, self.value_tiles).forward()
        out = relative if relative is not None else plain
        assert out is not None
        return self._project(tape, out)

    def _alpha(self, tape: Tape, x: Tensor) -> Tensor:
        spec, w, n = self.spec, self.w, self.rows
        joint = linear(tape, x, n, spec.dim, 3 * spec.inner_dim, self.joint, w)
        lows = {role: linear(tape, x, n, spec.dim, width, weights, w) for role, (width, weights) in self.low.items()}
        one = n * spec.inner_dim * w.value
        sources = dict(zip(("plain_query", "plain_key", "plain_value"), _split(tape, joint, one), strict=True))
        names = {"q": "query", "k": "key", "v": "value"}
        sources |= {names[role]: low for role, low in lows.items()}
        relative, plain = RelationTwin(tape, self.shape, dict(sources), self.logit_tiles, self.value_tiles).forward()
        assert plain is not None
        del sources
        if relative is not None:
            up = linear(tape, relative, n, self.shape.d_out, spec.inner_dim, self.low_output, w)
            total = add(tape, plain, up)
            plain = tape.result(tape.new(total.size), (total,), lambda grad: (tape.new(grad.size, GRADIENTS),))
            del total, up
        return self._project(tape, plain)


def _split(tape: Tape, joint: Tensor, one: int) -> list[Tensor]:
    """Three contiguous copies of a tensor's parts; backward joins their gradients."""
    received: list[Storage] = []

    def join(grad: Storage) -> tuple[Storage]:
        whole = tape.new(3 * one, GRADIENTS)
        received.clear()
        return (whole,)

    parts = tape.result(joint.storage, (joint,), join)

    def receive(grad: Storage) -> tuple[Storage]:
        received.append(grad)
        return (grad,)

    return [tape.result(tape.new(one), (parts,), receive) for _ in range(3)]
