"""Device overhead of a GPU: rounding, workspaces, communicators, intervals, overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.units import MIB
from translution.planner.hardware.catalog import Level, OverheadItem, find_gpu, load_catalog, read_data
from translution.planner.hardware.cluster import load_cluster
from translution.planner.hardware.device_overhead import MIN_BLOCK_BYTES, DeviceOverhead, block_bytes, estimate_overhead
from translution.planner.hardware.nccl import CONNECTION_BYTES

LEVELS: tuple[Level, ...] = ("low", "likely", "high")
GPUS = tuple(load_catalog().gpus)
SHAPES = [(1, 1), (2, 1), (8, 1), (16, 2), (2, 2), (512, 64)]


def test_the_block_size_is_that_of_torchs_header() -> None:
    header = (Path(torch.__file__).parent / "include" / "c10" / "core" / "AllocatorConfig.h").read_text()
    match = re.search(r"constexpr size_t kMinBlockSize = (\d+);", header)
    assert match
    assert int(match[1]) == MIN_BLOCK_BYTES


@given(st.integers(0, 2**40))
def test_a_block_holds_its_storage_and_less_than_one_unit_more(size: int) -> None:
    assert size <= block_bytes(size) < size + MIN_BLOCK_BYTES
    assert block_bytes(size) % MIN_BLOCK_BYTES == 0


def test_workspaces_are_those_of_torch() -> None:
    """cuBLAS has 8519680 bytes, from Hopper on 32 MiB; rocBLAS and hipBLASLt on MI300X have 128 and 76 MiB."""
    sizes = {gpu: estimate_overhead(gpu, 8, 1).item("blas_workspace") for gpu in GPUS}
    for gpu in ("A100-40", "A100-80", "L40S", "RTX4090"):
        assert (sizes[gpu].low_bytes, sizes[gpu].likely_bytes) == (8_519_680, 2 * 8_519_680)
    for gpu in ("H100", "H200", "B200"):
        assert (sizes[gpu].low_bytes, sizes[gpu].likely_bytes) == (33_554_432, 2 * 33_554_432)
    assert (sizes["MI300X"].low_bytes, sizes["MI300X"].likely_bytes) == (128 * MIB, 2 * 204 * MIB)
    assert all(entry.in_torch for entry in sizes.values())


def test_a_connection_has_the_size_that_nccl_was_seen_to_map() -> None:
    """9641984 bytes, with two pages of 4 KiB: github.com/tonyd2wild/DeepSeek-V4.1-Flash-vLLM-DGX-Spark/issues/8."""
    assert CONNECTION_BYTES + 2 * 4096 == 9_641_984


def test_communicators_of_eight_h100_by_hand() -> None:
    """24 channels: rings of two communicators and trees of one at 12 MiB, 16 x 2 MiB of NVLS for each of 8 GPUs.

    NCCL's kernels are there once.
    """
    entry = estimate_overhead("H100", 8, 1).item("nccl")
    assert entry.low_bytes == 16 * 12 * MIB
    assert entry.likely_bytes == (2 * 24 * 12 + 24 * 12 + 16 * 2 * 8 + 560) * MIB
    assert entry.high_bytes == (2 * (2 * 32 * 12 + 24 * 2 * 8) + 700 + 224) * MIB
    # Two nodes: 3 of the 24 channels leave the node at each GPU, with 8 MiB for a ring and 60 MiB for a tree.
    assert estimate_overhead("H100", 16, 2).item("nccl").likely_bytes == entry.likely_bytes + 3 * (2 * 8 + 60) * MIB


def test_relation_groups_and_replicas_have_communicators_of_their_own() -> None:
    """The group has one for its collectives and as many connections again for its all-to-all."""
    for gpu in ("H100", "MI300X", "RTX4090"):
        plain, group, replicas = (estimate_overhead(gpu, 8, 1, relation_ranks=ranks) for ranks in (1, 8, 4))
        for level in ("likely", "high"):
            sizes = [overhead.total(level) + overhead.total(level, "host") for overhead in (plain, group, replicas)]
            assert sizes[1] - sizes[0] == pytest.approx(2 * (sizes[2] - sizes[1]), rel=0.01)
            assert sizes[0] < sizes[1]
        assert plain.total("low") == replicas.total("low")
    entry = estimate_overhead("H100", 8, 1).item("nccl"), estimate_overhead("H100", 8, 1, relation_ranks=8).item("nccl")
    assert "rings of 4 communicators" in entry[1].formula


@pytest.mark.parametrize(
    ("gpu", "ranks", "mebibytes"),
    # One communicator: github.com/NVIDIA/nccl/issues/964, github.com/vllm-project/vllm/pull/46234 and issues/864.
    [("A100-80", 4, 688), ("H100", 8, 958), ("H100", 8, 1526)],
)
def test_measurements_of_others_are_within_the_interval(gpu: str, ranks: int, mebibytes: int) -> None:
    entry = estimate_overhead(gpu, ranks, 1).item("nccl")
    assert entry.low_bytes < mebibytes * MIB < entry.high_bytes


def test_communicators_need_no_more_beyond_two_nodes() -> None:
    """Source: github.com/NVIDIA/nccl/issues/986."""
    for gpu in GPUS:
        alone, two, many = (estimate_overhead(gpu, 8 * nodes, nodes).total("likely") for nodes in (1, 2, 64))
        assert alone <= two == many


def test_a_card_without_peer_access_keeps_buffers_on_the_host() -> None:
    card, linked = estimate_overhead("RTX4090", 4, 1), estimate_overhead("H100", 4, 1)
    assert card.total("likely", "host") == 3 * 2 * CONNECTION_BYTES
    assert card.item("nccl").likely_bytes < linked.item("nccl").likely_bytes / 4


@pytest.mark.parametrize(("ranks", "nodes"), SHAPES)
@pytest.mark.parametrize("gpu", GPUS)
def test_every_entry_is_an_interval_with_a_source(gpu: str, ranks: int, nodes: int) -> None:
    overhead = estimate_overhead(gpu, ranks, nodes)
    assert [entry.name for entry in overhead.breakdown] == [
        "driver_reserve",
        "context",
        "blas_workspace",
        "nccl",
        "nccl_host",
    ]
    for entry in overhead.breakdown:
        assert entry.low_bytes <= entry.likely_bytes <= entry.high_bytes
        assert entry.formula
        assert entry.source
    totals = [overhead.total(level) for level in LEVELS]
    assert totals == sorted(totals)
    assert 0.2 * 1024 * MIB < totals[0] < totals[2] < 6 * 1024 * MIB
    assert DeviceOverhead.model_validate_json(overhead.model_dump_json()) == overhead


def test_a_source_is_a_page_a_file_or_marked_as_an_estimate() -> None:
    shape: TypeAdapter[dict[str, dict[str, dict[str, Any]]]] = TypeAdapter(dict[str, dict[str, dict[str, Any]]])
    observed = [
        figure["source"] for group in read_data("device_overhead.yaml", shape).values() for figure in group.values()
    ]
    overheads = [estimate_overhead(gpu, ranks, 1) for gpu in GPUS for ranks in (1, 8)]
    computed = [item.source for overhead in overheads for item in overhead.breakdown]
    assert len(observed) == 19 + 7 + 2 + 16
    known = (
        r"github\.com/|reports/gpu|torch 2\.13|messages?|logs?|estimate, not measured|no connection|without the reserve"
    )
    for source in (*observed, *computed):
        assert re.search(known, source), source


def test_a_lone_rank_makes_no_connection() -> None:
    for gpu in GPUS:
        overhead = estimate_overhead(gpu, 1, 1)
        measured = find_gpu(gpu)[1].generation in ("hopper", "blackwell")
        assert overhead.item("nccl").likely_bytes == (560 if measured else 64) * MIB
        assert overhead.total("high", "host") == 0


def test_what_one_h200_held_is_the_likely_figure() -> None:
    """NVML's bytes in use less what torch reserved, in two plans of one rank (reports/gpu/gpu_check.json)."""
    overhead = estimate_overhead("H200", 1, 1)
    likely = overhead.item("context").likely_bytes + overhead.item("nccl").likely_bytes
    for in_use, reserved in ((23_398_776_832, 22_026_387_456), (23_818_207_232, 22_445_817_856)):
        assert likely == pytest.approx(in_use - reserved, rel=0.001)


def test_without_a_gpu_the_interval_spans_all_gpus() -> None:
    spanned = estimate_overhead(None, 8, 1)
    for name in ("driver_reserve", "context", "blas_workspace", "nccl", "nccl_host"):
        entries = [estimate_overhead(gpu, 8, 1).item(name) for gpu in GPUS]
        entry = spanned.item(name)
        assert entry.low_bytes == min(other.low_bytes for other in entries)
        assert entry.likely_bytes == max(other.likely_bytes for other in entries)
        assert entry.high_bytes == max(other.high_bytes for other in entries)


def test_the_device_total_computed_by_hand() -> None:
    """Tensors (70) and workspace (30) are half of what torch reserves; 10, 20 and 40 are outside of torch."""
    given_figures = {"driver_reserve": 10, "context": 20, "blas_workspace": 30, "nccl": 40, "fragmentation": 0.5}
    overhead = estimate_overhead("H100", 8, 1, given_figures)
    assert overhead.total() == 100
    assert (overhead.total(in_torch=True), overhead.total(in_torch=False)) == (30, 70)
    assert overhead.reserved_bytes(100) == 200
    assert [overhead.device_bytes(70, level) for level in LEVELS] == [270] * 3


def test_fragmentation_is_less_with_expandable_segments() -> None:
    plain, expandable = (estimate_overhead("A100-80", 8, 1, expandable_segments=value) for value in (False, True))
    for level in LEVELS:
        assert plain.reserved_bytes(10**9, level) > expandable.reserved_bytes(10**9, level) >= 10**9
    assert plain.reserved_bytes(10**9, "high") == pytest.approx(10**9 / 0.915)


def test_with_room_to_spare_the_driver_shows_what_torch_caches() -> None:
    """Published: 15% to 33% of what torch reserves; near the limit it gives that back, 8.5% at most."""
    overhead, tensors, card = estimate_overhead("H100", 8, 1), 40 * 10**9, 80 * 10**9
    outside = overhead.total("low", in_torch=False)
    allocated = tensors + overhead.total("low", in_torch=True)
    assert overhead.shown_bytes(tensors, "low", card) == pytest.approx(allocated / 0.85 + outside)
    for level in LEVELS:
        assert overhead.device_bytes(tensors, level) < overhead.shown_bytes(tensors, level, card)
    # A card that is nearly full shows no more than it has.
    assert overhead.shown_bytes(68 * 10**9, "high", card) == card
    assert overhead.device_bytes(68 * 10**9, "likely") < card


def test_overrides_replace_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "measured.yaml"
    path.write_text(
        "base: 8xH100\ngpu_constants:\n  context: 123\n"
        "  nccl: {low_bytes: 1, likely_bytes: 2, high_bytes: 3, source: measured}\n"
        "  fragmentation: {low: 0, likely: 0.1, high: 0.2}\n"
    )
    overhead, plain = load_cluster(str(path)).device_overhead(), load_cluster("8xH100").device_overhead()
    assert overhead
    assert plain
    context, nccl = overhead.item("context"), overhead.item("nccl")
    assert (context.low_bytes, context.likely_bytes, context.high_bytes, context.source) == (
        123,
        123,
        123,
        "given by the user",
    )
    assert (nccl.low_bytes, nccl.likely_bytes, nccl.high_bytes, nccl.source) == (1, 2, 3, "measured")
    assert overhead.item("driver_reserve") == plain.item("driver_reserve")
    assert overhead.item("blas_workspace") == plain.item("blas_workspace")
    assert overhead.fragmentation.high == 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"contxt": 1}, r"gpu_constants: unknown key 'contxt' \(did you mean 'context'\?\); allowed: driver_reserve,"),
        ({"context": -1}, "context.low_bytes: -1 is not allowed"),
        ({"context": True}, "context: True is not allowed"),
        ({"context": 1.5}, "context: 1.5 is not allowed"),
        ({"nccl": {"low_bytes": 3, "likely_bytes": 2, "high_bytes": 4}}, "nccl: 3, 2, 4 is not allowed: .*ascending"),
        ({"nccl": {"low_bytes": 3}}, "nccl.likely_bytes: is required"),
        ({"fragmentation": 1}, "fragmentation.low: 1 is not allowed: .*less than 1"),
        ({"fragmentation": {"low": 0.2, "likely": 0.1, "high": 0.3}}, "fragmentation: 0.2, 0.1, 0.3 is not allowed"),
    ],
)  # fmt: skip
def test_a_bad_override_is_one_line(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate_overhead("H100", 8, 1, overrides)


def test_an_item_out_of_order_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be in ascending order"):
        OverheadItem(name="x", low_bytes=2, likely_bytes=1, high_bytes=3, formula="", source="")


@pytest.mark.parametrize(
    ("gpu", "ranks", "nodes", "message"),
    [
        ("H1000", 8, 1, "gpu: GPU 'H1000' is not allowed: .*did you mean 'H100'"),
        ("H100", 2, 3, "nodes: 3 is not allowed: must be from 1 to 2"),
        ("H100", 2, 0, "nodes: 0 is not allowed"),
    ],
)
def test_an_impossible_request_is_rejected(gpu: str, ranks: int, nodes: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate_overhead(gpu, ranks, nodes)
