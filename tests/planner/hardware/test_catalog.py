"""GPUs, nodes and clusters: vendors' figures, names, cluster files and the fields that they replace."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pydantic import BaseModel

from translution.planner.common.errors import InputError
from translution.planner.common.machine import usable_cores
from translution.planner.common.units import GIB
from translution.planner.hardware.catalog import Catalog, Figure, find_gpu, find_node, load_catalog
from translution.planner.hardware.cluster import ClusterSpec, load_cluster

UNITS = {"": 1, "GiB": GIB, "TB": 1e12, "TFLOP/s": 1e12, "GB/s": 1e9, "Gb/s": 1e9 / 8}
CLUSTERS = [
    *load_catalog().nodes,
    *(f"{nodes}x{gpus}x{gpu}" for nodes, gpus in ((1, 1), (64, 8)) for gpu in load_catalog().gpus),
]


def published(root: Path) -> list[dict[str, str]]:
    with (root / "tests" / "data" / "datasheets.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(spec: BaseModel) -> dict[str, Figure]:
    return {name: value for name, value in spec if isinstance(value, Figure)}


def entry(name: str) -> BaseModel:
    return load_catalog().gpus[name] if name in load_catalog().gpus else load_catalog().nodes[name]


def test_figures_are_what_vendors_print(root: Path) -> None:
    """Figures that a vendor prints for both directions or with sparsity are halved."""
    rows = published(root)
    assert len(rows) > 90
    for row in rows:
        value = figures(entry(row["name"]))[row["figure"]].value
        expected = float(row["published"]) * UNITS[row["unit"]]
        if row["note"] == "nominal":
            # The driver reserves some memory, also for error correction.
            assert 0.93 * expected < value <= expected, row
        else:
            assert value == pytest.approx(expected / (2 if row["note"] in ("sparse", "both ways") else 1), rel=1e-3), (
                row
            )


def test_every_peak_of_a_gpu_has_a_published_figure(root: Path) -> None:
    known = {(row["name"], row["figure"]) for row in published(root)}
    peaks = {(name, figure) for name, gpu in load_catalog().gpus.items() for figure in figures(gpu)}
    # Vendors do not print the share of the peak that is reached.
    missing = {(name, figure) for name, figure in peaks - known if figure != "matmul_share"}
    assert missing == {("RTX4090", "link_bytes_per_s")}  # an estimate: the GPU has no link


def test_every_figure_is_positive_and_names_a_source_with_a_page() -> None:
    known = load_catalog()
    used = set()
    for spec in (*known.gpus.values(), *known.nodes.values()):
        for name, figure in figures(spec).items():
            assert figure.value > 0, name
            used.add(figure.source)
    assert used == set(known.sources)
    pageless = {key: source.title for key, source in known.sources.items() if source.url is None}
    known_without = r"estimate, not measured|public (logs|test)|no page of the vendor's|a choice of parts"
    assert all(re.search(known_without, title) for title in pageless.values()), pageless
    assert all("estimate, not measured" in known.sources[key].title for key in ("estimate", "pm9a3"))


def test_a_node_has_a_known_gpu_and_the_bandwidth_of_its_link() -> None:
    known = load_catalog()
    for name, gpu in known.gpus.items():
        node = known.nodes[gpu.node]
        if name == "H100-NVL":
            # The bridge joins two of eight.
            assert node.intra_node_bytes_per_s == node.pcie_bytes_per_s
        else:
            assert node.intra_node_bytes_per_s == gpu.link_bytes_per_s
        if name.startswith("GH200"):
            # The host is at the other end of an NVLink.
            assert node.pcie_bytes_per_s == gpu.link_bytes_per_s
            continue
        # 16 lanes of 8, 16 or 32 GT/s, which no processor exceeds; 128 of every 130 bits are data.
        lanes = 16 * {3: 8e9, 4: 16e9, 5: 32e9, 6: 32e9}[int(gpu.pcie_generation.value)] * 128 / 130 / 8
        assert node.pcie_bytes_per_s.value == pytest.approx(lanes, rel=1e-3)
    assert {node.gpu for node in known.nodes.values()} <= set(known.gpus)


def test_the_catalog_survives_json() -> None:
    assert Catalog.model_validate_json(load_catalog().model_dump_json()) == load_catalog()


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_named_cluster_is_complete_and_survives_json(name: str) -> None:
    cluster = load_cluster(name)
    values = cluster.model_dump()
    missing = {field for field, value in values.items() if value is None}
    assert cluster.gpu is not None
    lacking = {"V": {"bf16_flops_per_s", "tf32_flops_per_s"}, "MI355X": {"tf32_flops_per_s"}}
    known = next((fields for start, fields in lacking.items() if cluster.gpu.startswith(start)), set())
    assert missing == {"price_per_gpu_hour", "gpu_constants", "measured"} | known
    assert all(value > 0 for value in values.values() if isinstance(value, int | float))
    assert ClusterSpec.model_validate_json(cluster.model_dump_json()) == cluster


def test_a_cluster_has_the_figures_of_its_gpu_and_node() -> None:
    cluster = load_cluster("2x8xh100")
    assert (cluster.name, cluster.gpu, cluster.device) == ("2x8xH100", "H100", "cuda")
    assert (cluster.nodes, cluster.ranks_per_node, cluster.world_size) == (2, 8, 16)
    assert cluster.device_memory_bytes == 81_559 * 2**20
    assert (cluster.bf16_flops_per_s, cluster.memory_bytes_per_s) == (989.5e12, 3.35e12)
    assert (cluster.host_memory_bytes, cluster.host_cores, cluster.nics) == (2048 * GIB, 112, 8)
    assert load_cluster("2xDGX-H100") == cluster.model_copy(update={"name": "2xdgx-h100"})
    assert load_cluster("g6e.48xlarge").gpu == "L40S"


def test_a_smaller_node_is_a_share_of_the_catalogs_node() -> None:
    """One of a tower's four GPUs gets 64 GiB, 8 cores, a quarter of the drive, one adapter and all bandwidths."""
    one, four = load_cluster("1xRTX4090"), load_cluster("rtx4090-tower")
    assert (one.host_memory_bytes, one.host_cores, one.nics) == (64 * GIB, 8, 1)
    assert one.nvme_bytes == 10**12
    assert one.nvme_read_bytes_per_s == four.nvme_read_bytes_per_s == pytest.approx(7.45e9)
    assert one.host_memory_bytes_per_s == four.host_memory_bytes_per_s
    assert one.pcie_bytes_per_s == four.pcie_bytes_per_s
    double = load_cluster("16xH100")
    assert (double.host_memory_bytes, double.host_memory_bytes_per_s) == (4096 * GIB, pytest.approx(2 * 614.4e9))


def test_a_file_replaces_fields_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("base: 2x8xH100\nhost_memory_bytes: 1000000\nprice_per_gpu_hour: 2.5\n")
    cluster, base = load_cluster(str(path)), load_cluster("2x8xH100")
    assert cluster == base.model_copy(update={"name": "lab", "host_memory_bytes": 1_000_000, "price_per_gpu_hour": 2.5})
    path.write_text("base: dgx-a100\ngpu: a100-40\nname: old\nnvme_bytes: 1\n")
    cluster = load_cluster(str(path))
    assert (cluster.name, cluster.gpu, cluster.device_memory_bytes) == ("old", "A100-40", 40 * GIB)
    assert (cluster.memory_bytes_per_s, cluster.host_cores, cluster.nvme_bytes) == (1.555e12, 128, 1)


def test_a_file_may_name_its_gpu_or_describe_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"gpu": "l40s", "ranks_per_node": 2, "fp32_flops_per_s": 1e12}')
    cluster = load_cluster(str(path))
    assert (cluster.device_memory_bytes, cluster.fp32_flops_per_s) == (46_068 * 2**20, 1e12)
    assert cluster.nvme_bytes is None
    path.write_text('{"ranks_per_node": 2, "device_memory_bytes": 1000}')
    assert load_cluster(str(path)).gpu is None


def test_a_file_may_start_from_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "here.yml"
    path.write_text("base: cpu:1\nhost_memory_bytes: 5\n")
    cluster = load_cluster(str(path))
    assert (cluster.device, cluster.host_memory_bytes, cluster.host_cores) == ("cpu", 5, usable_cores())
    assert cluster.device_overhead() is None


def test_a_cluster_of_an_older_plan_is_read() -> None:
    """Version 0.1 had six fields."""
    old = {"name": "8xH100", "device": "cuda", "nodes": 1, "ranks_per_node": 8, "device_memory_bytes": 9}
    cluster = ClusterSpec.model_validate(old | {"host_memory_bytes": 8})
    assert (cluster.world_size, cluster.gpu, cluster.bf16_flops_per_s) == (8, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 2x8xH1000\n", "GPU 'H1000' is not allowed: .*did you mean 'H100'"),
        ("base: dgx-h10\n", "cluster: 'dgx-h10' is not allowed: must be cpu:RANKS, .*did you mean 'dgx-h100'"),
        ("base: other.yaml\n", "bad.yaml: base: 'other.yaml' is not allowed: must be the name of a cluster"),
        ("base: [1]\n", r"base: \[1\] is not allowed"),
        ("base: 8xH100\nnvme_byte: 1\n", r"unknown key 'nvme_byte' \(did you mean 'nvme_bytes'\?\); allowed: base,"),
        ("base: 8xH100\nnvme_bytes: -1\n", "nvme_bytes: -1 is not allowed: .*greater than or equal to 1"),
        ("base: 8xH100\nbf16_flops_per_s: fast\n", "bf16_flops_per_s: 'fast' is not allowed"),
        ("base: 8xH100\nprice_per_gpu_hour: 0\n", "price_per_gpu_hour: 0 is not allowed"),
        ("base: 8xH100\nprice_per_gpu_hour: .inf\n", "price_per_gpu_hour: inf is not allowed"),
        ("gpu: H30\nranks_per_node: 1\n", "bad.yaml: GPU 'H30' is not allowed"),
        ("base: 8xH100\ngpu_constants: {contxt: 1}\n", "gpu_constants: unknown key 'contxt' .*'context'"),
        ("base: 8xH100\ngpu_constants: {nccl: -1}\n", "gpu_constants: nccl.low_bytes: -1 is not allowed"),
        ("base: 8xH100\ngpu_constants: 3\n", "gpu_constants: 3 is not allowed"),
        ("- 1\n", "holds a list"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_cluster(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["0xdgx-h100", "2x4xdgx-h100", "xH100", "8xH100x", "dgx", "x" * 5000, ""])
def test_a_name_of_no_cluster_is_rejected(name: str) -> None:
    with pytest.raises(InputError, match="is not allowed"):
        load_cluster(name)


def test_an_unknown_name_gets_a_hint_with_the_closest_names() -> None:
    with pytest.raises(
        InputError, match=r"GPU 'A100' is not allowed.*\(did you mean 'A100-40', 'A100-80' or 'A100-PCIe-40'\?\)"
    ):
        load_cluster("8xA100")
    with pytest.raises(InputError, match=r"\(did you mean 'dgx-h100'\?\)"):
        load_cluster("2xdgx-h10")
    with pytest.raises(InputError, match=r"must be one of A100-40, .*did you mean 'MI300X'"):
        find_gpu("mi300")
    with pytest.raises(InputError, match=r"must be one of dgx-a100, .*did you mean 'dgx-b200'"):
        find_node("dgxb200")


def test_a_wheel_holds_the_data_files(root: Path, tmp_path: Path) -> None:
    for folder in ("planner", "models", "distributed", "reports", "cli", "translution"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    program = "from setuptools.build_meta import build_wheel; print(build_wheel('wheels'))"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (root / "planner" / "hardware" / "data").iterdir():
        assert f"translution/planner/hardware/data/{path.name}" in names
    assert "translution/planner/plans/train_fsdp2.py.txt" in names
