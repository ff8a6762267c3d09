"""The ranks of a group: which pairs each one computes, and the exchanges of rows and of pairs between them.

Two collectives serve all exchanges, an all-gather of equal tensors and an all-to-all; gloo and NCCL have both. The
receiver adds up what several ranks send, in the order of the ranks, so the result does not depend on the backend.

Legend of shape suffixes: g ranks of the group, b samples of a rank, n tokens, c width of a row, h heads,
p pairs of all relations, sorted by owner, q pairs of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from translution.planner.common import InputError
from translution.planner.config import RelationGeometry, check_owners, deal_relations, owned_geometry

from ..context import accumulation_dtype, relation_index


def all_gather_equal(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Collect equal tensors of all ranks of a group in one, (m, …) → (g·m, …), rank by rank.

    Args:
        out: where they are written.
        own: this rank's tensor.
        group: the ranks.
    """
    # torch 2.13 has a new name for the function, and warns of the old one.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out, own.contiguous(), group=group)


class RelationGroup:
    """The ranks that share out the relations of a layer.

    Args:
        process_group: the ranks.
        geometry: arrangement of the tokens.
        owners: the rank within the group that owns each relation; by default they are dealt by `deal_relations`.

    Raises:
        InputError: if this process is not in the group, there are more ranks than relations, or the owners are wrong.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, geometry: RelationGeometry, owners: Sequence[int] | None = None
    ) -> None:
        if not isinstance(process_group, dist.ProcessGroup):
            raise InputError(
                f"relation_group: {process_group!r} is not allowed: must be a process group that has this rank"
            )
        self.process_group, self.geometry = process_group, geometry
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.size > geometry.relations:
            raise InputError(
                f"relation_group: {self.size} ranks are not allowed: must be at most the number of relations "
                f"{geometry.relations}"
            )
        self.owners = deal_relations(geometry, self.size) if owners is None else tuple(owners)
        check_owners(geometry, self.owners, self.size)
        parts = [owned_geometry(geometry, self.owners, rank) for rank in range(self.size)]
        self.owned = parts[self.rank]
        """This rank's relations."""
        self.pairs = tuple(part.total_pairs for part in parts)
        """Number of pairs of each rank."""
        self.dropout_ranks = process_group
        """Ranks whose samples are one batch, in this order, to the dropout of attention weights."""
        self._positions: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RelationGroup:
        """Return the group itself: a copy of a layer works in the same group."""
        return self

    def positions(self, device: torch.device) -> Tensor:
        """Return the position of every pair in a flattened (n, n) matrix, sorted by owner, (p,)."""
        if device not in self._positions:
            owners = torch.tensor((*self.owners, self.size))  # The last is that of pairs that do not exist: index −1.
            by_pair = owners[relation_index(self.geometry, torch.device("cpu")).flatten()]
            self._positions[device] = by_pair.argsort(stable=True)[: sum(self.pairs)].to(device)
        return self._positions[device]

    def own_positions(self, device: torch.device) -> Tensor:
        """Return the positions of this rank's pairs, (q,)."""
        own: Tensor = self.positions(device).split(self.pairs)[self.rank]
        return own

    def gather_rows(self, x_bnc: Tensor) -> Tensor:
        """Collect the rows of all ranks' samples, (b, n, c) → (g·b, n, c), rank by rank."""
        out = x_bnc.new_empty(self.size * len(x_bnc), *x_bnc.shape[1:])
        all_gather_equal(out, x_bnc, self.process_group)
        return out

    def sum_rows(self, x_bnc: Tensor) -> Tensor:
        """Add up the ranks' parts of this rank's samples, (g·b, n, c) → (b, n, c).

        The parts travel in their dtype; they are summed in the order of the ranks, in fp32 if they are narrower.
        """
        received = torch.empty_like(x_bnc)
        dist.all_to_all_single(received, x_bnc.contiguous(), group=self.process_group)
        first, *others = received.unflatten(0, (self.size, -1))
        # A copy: a view would keep the rows of all ranks.
        total: Tensor = first.to(accumulation_dtype(x_bnc.dtype), copy=True)
        for part in others:
            total += part
        return total.to(x_bnc.dtype)

    def collect_pairs(self, own_bhnn: Tensor, dtype: torch.dtype) -> Tensor:
        """Send the values of this rank's pairs to the ranks of the samples: (g·b, h, n, n) → (b, h, p).

        Args:
            own_bhnn: matrices of all samples; only the values of this rank's pairs are read.
            dtype: dtype in which they travel.
        """
        samples, heads = own_bhnn.shape[:2]
        batch = samples // self.size
        sent = own_bhnn.flatten(2).index_select(2, self.own_positions(own_bhnn.device)).to(dtype)
        received = sent.new_empty(batch * heads * sum(self.pairs))
        sizes = [batch * heads * count for count in self.pairs]
        dist.all_to_all_single(
            received, sent.view(-1), sizes, [sent.numel() // self.size] * self.size, group=self.process_group
        )
        parts = [part.view(batch, heads, count) for part, count in zip(received.split(sizes), self.pairs, strict=True)]
        return torch.cat(parts, dim=2)

    def spread_pairs(self, local_bhnn: Tensor, dtype: torch.dtype) -> Tensor:
        """Send the values of all pairs to their owners: (b, h, n, n) → (g·b, h, q), those of this rank's pairs.

        Args:
            local_bhnn: matrices of this rank's samples.
            dtype: dtype in which the values travel.
        """
        batch, heads = local_bhnn.shape[:2]
        values = local_bhnn.flatten(2).index_select(2, self.positions(local_bhnn.device)).to(dtype)
        sent = torch.cat([part.flatten() for part in values.split(self.pairs, dim=2)])
        received = sent.new_empty(self.size * batch, heads, self.pairs[self.rank])
        sizes = [batch * heads * count for count in self.pairs]
        dist.all_to_all_single(
            received.view(-1), sent, [received.numel() // self.size] * self.size, sizes, group=self.process_group
        )
        return received

    @property
    def dropout_rank(self) -> int:
        """Number of this rank among those that drop what one process with all their samples would."""
        return dist.get_rank(self.dropout_ranks)

    def share_seed(self, seed: int, device: torch.device) -> int:
        """Return the seed that the first of the ranks has drawn that drop what one process would."""
        seeds = torch.empty(dist.get_world_size(self.dropout_ranks), dtype=torch.int64, device=device)
        own = torch.tensor([seed], dtype=torch.int64, device=device)
        all_gather_equal(seeds, own, self.dropout_ranks)
        return int(seeds[0])
