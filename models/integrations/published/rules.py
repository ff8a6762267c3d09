"""How every tensor of the authors' networks becomes one of ours, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from translution.planner.config import ModelSpec, VitSpec

from ...layers.tables import ROLE_NAMES
from .revisions import Convention

Forth = Callable[[Tensor], Sequence[Tensor]]
Back = Callable[[Sequence[Tensor]], Tensor]


def _same(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _only(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs, and those of ours with the same values."""

    theirs: str
    ours: tuple[str, ...]
    forth: Forth = _same
    """Their tensor → ours."""
    back: Back = _only
    """Our tensors → theirs."""


def _renamed(theirs: str, ours: str, *leaves: str) -> Iterator[Rule]:
    for leaf in leaves or ("weight", "bias"):
        yield Rule(f"{theirs}.{leaf}", (f"{ours}.{leaf}",))


def published_rules(spec: ModelSpec, trunk: str, convention: Convention) -> Iterator[Rule]:
    """Yield the rule of every tensor with weights.

    Args:
        spec: the network.
        trunk: what the keys of their layers begin with.
        convention: what their ``to_q`` and ``to_k`` hold.
    """
    yield from _renamed(f"{trunk}.norm", "norm")
    if isinstance(spec, VitSpec):
        for number, name in ((1, "patch_norm"), (2, "projection"), (3, "norm")):
            yield from _renamed(f"to_patch_embedding.{number}", f"embedding.{name}")
        yield from _renamed("mlp_head", "head")
        yield Rule("cls_token", ("class_token.weight",))
        if spec.learned_positions:
            yield Rule("pos_embedding", ("positions.weight",))
    else:
        yield from _renamed("wte", "embedding", "weight")
        yield from _renamed("norm", "head_norm")
        yield from _renamed("output_head", "head", "weight")
        if spec.learned_positions:
            yield Rule("wpe.weight", ("positions.weight",), lambda tensor: (tensor[None],), lambda ours: ours[0][0])
    for number, operator in enumerate(spec.layer_operators):
        theirs, ours = f"{trunk}.layers.{number}", f"blocks.{number}"
        yield from _renamed(f"{theirs}.0.norm", f"{ours}.operator_norm")
        if spec.has_output_projection:
            yield from _renamed(f"{theirs}.0.to_out.0", f"{ours}.operator.output")
        for place, name in ((0, "ffn_norm"), (1, "ffn.up"), (4, "ffn.down")):
            yield from _renamed(f"{theirs}.1.net.{place}", f"{ours}.{name}")
        layer = _LayerRules(spec, convention, f"{theirs}.0", f"{ours}.operator")
        yield from {"attention": layer.attention, "translution": layer.full, "alpha": layer.low}[operator]()


@dataclass(frozen=True)
class _LayerRules:
    """Rules of one operator."""

    spec: ModelSpec
    convention: Convention
    theirs: str
    ours: str

    def attention(self) -> Iterator[Rule]:
        """Self-attention."""
        yield self._joint("projections", turned=self.spec.rotary_attention)

    def full(self) -> Iterator[Rule]:
        """Translution: a table or a matrix for each role; two matrices are stored as one."""
        plain = [role for role in "qkv" if role not in self.spec.roles]
        names = tuple(f"{self.ours}.plain.{role}.weight" for role in plain)
        if plain:
            yield Rule(
                f"{self.theirs}.to_{''.join(plain)}.weight", names, lambda tensor: tensor.chunk(len(plain)), _stacked
            )
        for role in self.spec.roles:
            yield self._table(role, f"to_{self._stored(role)}")

    def low(self) -> Iterator[Rule]:
        """α-Translution."""
        roles = self.spec.roles
        yield self._joint("plain", turned=self.spec.rotary)
        for role in "qk" if set("qk") & set(roles) else "":
            yield Rule(f"{self.theirs}.to_{self._stored(role)}1.weight", (f"{self.ours}.low.{role}.weight",))
        if "v" in roles:
            yield Rule(f"{self.theirs}.to_v1.weight", (f"{self.ours}.low.v.weight",))
            yield Rule(f"{self.theirs}.to_v3.weight", (f"{self.ours}.low_output.weight",))
        for role in roles:
            yield self._table(role, f"to_{self._stored(role)}2")

    def _stored(self, role: str) -> str:
        """Return the role that the file calls this one."""
        return role if self.convention is Convention.NEW else {"q": "k", "k": "q", "v": "v"}[role]

    def _table(self, role: str, name: str) -> Rule:
        tiles = "value_tiles" if role == "v" else "logit_tiles"
        order = self._order(role)
        rows = [0] * len(order) if role == "q" and self.convention is Convention.OLDEST else order
        # Every order is its own inverse.
        return Rule(
            f"{self.theirs}.{name}.unique_params",
            (f"{self.ours}.tables.{tiles}.0.{ROLE_NAMES[role]}",),
            lambda tensor: (tensor[rows],),
            lambda ours: ours[0][order],
        )

    def _order(self, role: str) -> list[int]:
        """Return the row of their table for each matrix of ours, which is stored by the pair's own relation."""
        geometry = self.spec.geometry
        numbers = list(range(geometry.relations))
        if role != "q":
            return numbers
        # A ViT's queries are numbered by the reversed pair, as in the equations; a GPT's tables are stored in reverse.
        return numbers[::-1] if geometry.causal else [geometry.reverse(number) for number in numbers]

    def _joint(self, name: str, *, turned: bool) -> Rule:
        """Return the rule of the joint projection to queries, keys and values."""
        order = torch.tensor(self._turned_rows() if turned else range(3 * self.spec.inner_dim))
        inverse = torch.argsort(order)
        return Rule(
            f"{self.theirs}.to_qkv.weight",
            (f"{self.ours}.{name}.weight",),
            lambda tensor: (tensor[order],),
            lambda ours: ours[0][inverse],
        )

    def _turned_rows(self) -> list[int]:
        """Return the row of theirs for each of ours: they turn coordinates k and k + D/2 of a head together."""
        spec = self.spec
        rows = list(range(3 * spec.inner_dim))
        if spec.rotary_pairs == "halves":
            return rows
        half = spec.head_dim // 2
        for head in range(2 * spec.heads):
            first = head * spec.head_dim
            for k in range(half):
                rows[first + 2 * k], rows[first + 2 * k + 1] = first + k, first + half + k
        return rows
