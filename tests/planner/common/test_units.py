"""Bytes that are given as text with a unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from translution.planner.common.errors import InputError
from translution.planner.common.units import parse_bytes
from translution.planner.hardware.cluster import load_cluster


@pytest.mark.parametrize(
    ("text", "size"),
    [("512GB", 512 * 10**9), ("80GiB", 80 * 2**30), ("1.5TB", 15 * 10**11), ("1.5 tib", 3 * 2**39), ("7 B", 7)],
)
def test_bytes_take_a_unit(text: str, size: int, tmp_path: Path) -> None:
    assert parse_bytes(text) == size
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: 2x8xH100\nhost_memory_bytes: {text}\nnvme_bytes: {text}\n")
    cluster = load_cluster(path)
    assert (cluster.host_memory_bytes, cluster.nvme_bytes) == (size, size)


@pytest.mark.parametrize("value", ["512", "GB", "-1GB", "5 GBit", "1e3GB", "5GB/s", "٣GB", "0GB", "9" * 18 + "TB"])
def test_other_texts_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"host_memory_bytes: "):
        load_cluster({"base": "8xH100", "host_memory_bytes": value})


@pytest.mark.parametrize(("text", "rate"), [("25GB/s", 25e9), ("1.5 TB / s", 15e11), ("2GiB/s", 2**31), ("3.0e9", 3e9)])
def test_rates_take_a_unit(text: str, rate: float, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: 2x8xH100\nnic_bytes_per_s: {text}\n")
    assert load_cluster(path).nic_bytes_per_s == rate


@pytest.mark.parametrize("value", ["25GB", "200Gb/s", "25GB/h", "25 /s", "-1GB/s", "GB/s", "nan"])
def test_other_rates_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=r"nic_bytes_per_s: "):
        load_cluster({"base": "8xH100", "nic_bytes_per_s": value})


def test_a_gpu_that_is_unknown_can_be_described() -> None:
    with pytest.raises(InputError, match=r"GPU 'V200' .* a cluster file can describe another one by ranks_per_node"):
        load_cluster("8xV200")
    own = {"ranks_per_node": 8, "device_memory_bytes": "32GiB", "fp16_flops_per_s": 1e14}
    assert load_cluster(own).device_memory_bytes == 2**35


def test_a_typing_error_is_told_before_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("ranks_per_nod: 8\ndevice_memory_bytes: 32GiB\n")
    with pytest.raises(InputError, match=r"unknown key 'ranks_per_nod' \(did you mean 'ranks_per_node'\?\)"):
        load_cluster(path)
