"""``translution clusters``."""

from __future__ import annotations

from pydantic import BaseModel

from translution.planner.common import GIB, format_bytes
from translution.planner.hardware import (
    Catalog,
    DeviceOverhead,
    Figure,
    GpuSpec,
    Level,
    NodeSpec,
    estimate_overhead,
    load_catalog,
)

from ...options import JsonOption
from ...output import console, make_table, print_json
from .. import app

_LEVELS: tuple[Level, ...] = ("low", "likely", "high")


def _scaled(figure: Figure | None, unit: float) -> str:
    if figure is None:
        return "-"
    value = figure.value / unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _giga(figure: Figure) -> str:
    return _scaled(figure, 1e9)


def _gibibytes(figure: Figure) -> str:
    return f"{figure.value / GIB:,.{0 if figure.value >= 100 * GIB else 1}f}"


def _numbers(spec: BaseModel, known: Catalog) -> str:
    """Return the numbers of the sources of a GPU's or node's figures, as in the printed list of sources."""
    numbers = {key: number for number, key in enumerate(known.sources, start=1)}
    used = {numbers[value.source] for _, value in spec if isinstance(value, Figure)}
    return " ".join(str(number) for number in sorted(used))


def _gpu_row(name: str, gpu: GpuSpec, known: Catalog) -> tuple[str, ...]:
    flops = (gpu.bf16_flops_per_s, gpu.fp16_flops_per_s, gpu.tf32_flops_per_s, gpu.fp32_flops_per_s)
    bf16, fp16, tf32, fp32 = (_scaled(figure, 1e12) for figure in flops)
    return (
        name,
        bf16 if bf16 == fp16 else f"{bf16}, {fp16}",
        tf32,
        fp32,
        _gibibytes(gpu.memory_bytes),
        _giga(gpu.memory_bytes_per_s),
        _giga(gpu.link_bytes_per_s),
        str(gpu.pcie_generation.value),
        gpu.node,
        _numbers(gpu, known),
    )


def _node_row(name: str, node: NodeSpec, known: Catalog) -> tuple[str, ...]:
    return (
        name,
        str(node.gpus.value),
        _gibibytes(node.host_memory_bytes),
        _giga(node.host_memory_bytes_per_s),
        str(node.host_cores.value),
        _giga(node.intra_node_bytes_per_s),
        f"{node.nics.value} x {_giga(node.nic_bytes_per_s)}",
        _scaled(node.nvme_bytes, 1e12),
        f"{_giga(node.nvme_read_bytes_per_s)}/{_giga(node.nvme_write_bytes_per_s)}",
        _numbers(node, known),
    )


def _overhead_row(name: str, overhead: DeviceOverhead) -> tuple[str, ...]:
    low, likely, high = (format_bytes(overhead.total(level)) for level in _LEVELS)
    entries = (format_bytes(entry.likely_bytes) for entry in overhead.breakdown if entry.tier == "device")
    return (name, *entries, low, likely, high)


_GPU_COLUMNS = ("GPU", "bf16, fp16", "tf32", "fp32", "GiB", "GB/s", "link", "PCIe", "node", "sources")
_NODE_COLUMNS = ("node", "GPUs", "GiB", "GB/s", "cores", "link", "network", "NVMe", "GB/s", "sources")
_OVERHEAD_COLUMNS = ("GPU", "driver", "context", "BLAS", "NCCL", "lowest", "likely", "highest")


def _print_tables(known: Catalog, overhead: dict[str, DeviceOverhead]) -> None:
    out = console()
    rows = [_gpu_row(name, gpu, known) for name, gpu in known.gpus.items()]
    out.print(
        make_table("GPUs: dense TFLOP/s; GiB and GB/s of memory; GB/s of the link, per direction", _GPU_COLUMNS, rows)
    )
    rows = [_node_row(name, node, known) for name, node in known.nodes.items()]
    title = "Nodes: GiB and GB/s of RAM; GB/s per direction of link and network; TB, read/write GB/s of NVMe"
    out.print(make_table(title, _NODE_COLUMNS, rows))
    rows = [_overhead_row(name, entry) for name, entry in overhead.items()]
    out.print(make_table("Device memory outside torch's tensors, on one such node", _OVERHEAD_COLUMNS, rows))
    out.print("Sources", style="bold")
    for number, source in enumerate(known.sources.values(), start=1):
        out.print(f"{number:>2} {source.title}" + (f": {source.url}" if source.url else ""), soft_wrap=True)


@app.command("clusters", epilog="Examples: **translution clusters** · **translution clusters --json**")
def clusters_cli(as_json: JsonOption = False) -> None:
    """List the GPUs and nodes that `--cluster` accepts; each figure has its source."""
    known = load_catalog()
    overhead = {
        name: estimate_overhead(name, int(known.nodes[gpu.node].gpus.value), 1) for name, gpu in known.gpus.items()
    }
    if as_json:
        overhead_json = {name: entry.model_dump(mode="json") for name, entry in overhead.items()}
        print_json(known.model_dump(mode="json") | {"gpu_constants": overhead_json})
        return
    _print_tables(known, overhead)
