"""The simulated operator of a rank in a relation group, compared with torch's allocator on real ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import run_ranks_of
from programs.measuring import relation_memory as program

from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.model import parse_model_spec
from translution.planner.simulator.network.group_share import GroupShare, largest_places
from translution.planner.simulator.network.model import MICRO_BATCHES, Replay, replay
from translution.planner.simulator.network.ops import DtypeSizes

RANKS = 3
STRAY_BYTES = 128
"""Bytes of scalars and padding that the simulation leaves out."""
TOO_HIGH = 0.03
"""Share by which a peak may be below the prediction, which takes a tile's largest relation for each of its products."""

BATCHED_TOO_HIGH = 0.3
"""The scratch of many relations at a time has an upper bound."""


def predicted(case: dict[str, Any], how: str, rank: int) -> Replay:
    spec = parse_model_spec(case)
    sizes = DtypeSizes.autocast("cpu", packs=False)
    if how == "batched":
        sizes = replace(DtypeSizes.of(4, "cuda"), copies_products=False)
    elif how != "autocast":
        sizes = DtypeSizes.of(getattr(torch, how).itemsize, "cpu", packs=False)
    share = GroupShare(spec.geometry, RANKS, rank, uses_gloo=True)
    return replay(spec, program.BATCH, sizes, program.TILE, share=share)


@pytest.mark.ranks
def test_peaks_and_saved_bytes_of_ranks_that_share_out_relations_are_predicted(tmp_path: Path) -> None:
    """One start of three ranks, which own different numbers of relations and pairs."""
    run_ranks_of([program.__file__, tmp_path], RANKS, tmp_path / "log")
    differ = 0
    for number, (case, how) in enumerate(program.CASES):
        measured = [json.loads((tmp_path / f"{rank}.json").read_text())[number] for rank in range(RANKS)]
        differ += len({found["backward"] for found in measured}) > 1
        for rank, found in enumerate(measured):
            ours = predicted(case, how, rank)
            assert ours.saved_bytes == found["saved"], (case, how, rank)
            for phase in ("forward", "backward"):
                peak = ours.memory.peaks[phase]
                more = peak.total_bytes - peak.live_bytes[MICRO_BATCHES] - found[phase]
                limit = BATCHED_TOO_HIGH if how == "batched" else TOO_HIGH
                ratio = more / found[phase]
                assert -STRAY_BYTES <= more <= STRAY_BYTES + limit * found[phase], (case, how, rank, phase, ratio)
    assert differ >= 3


def test_the_places_that_may_hold_the_most_have_most_relations_and_most_pairs() -> None:
    for geometry, ranks in (
        (RelationGeometry.grid(4, 3, class_token=True), 3),
        (RelationGeometry.sequence(7, causal=True), 4),
        (RelationGeometry.grid(5, 5, window=2), 8),
    ):
        parts = [GroupShare(geometry, ranks, place).owned for place in range(ranks)]
        found = [parts[place] for place in largest_places(geometry, ranks)]
        assert max(part.relations for part in found) == max(part.relations for part in parts)
        assert max(part.total_pairs for part in found) == max(part.total_pairs for part in parts)
