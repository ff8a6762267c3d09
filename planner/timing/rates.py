"""Rates at which a cluster computes and transfers: measured by `translution calibrate`, or a fraction of the peaks.

The fractions (efficiencies) are estimates with an interval. The section ``measured`` of a cluster file replaces them.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal, TypeAlias

from ..common.errors import InputError
from ..common.types import DTYPE_BYTES, Precision
from ..hardware.catalog import GpuSpec, find_gpu
from ..hardware.cluster import ClusterSpec, MatmulRate, MeasuredRates, Transfer, interpolate

RateLevel: TypeAlias = Literal["slow", "likely", "fast"]
RATE_LEVELS: tuple[RateLevel, ...] = ("slow", "likely", "fast")
EFFICIENCIES: dict[str, tuple[float, float, float]] = {
    "grouped": (0.30, 0.50, 0.70),
    "memory": (0.60, 0.75, 0.90),
    "link": (0.55, 0.75, 0.90),
    "network": (0.50, 0.70, 0.90),
    "pcie": (0.50, 0.75, 0.90),
    "host": (0.40, 0.60, 0.80),
    "nvme": (0.50, 0.75, 0.95),
}
"""Fraction of a peak that is reached: slow, likely, fast. Estimates, not measured."""
MATMUL_SHARE, MATMUL_SPREAD = 0.60, (0.81, 1.0, 1.15)
"""Share of the peak that large products reach on a GPU that is not in the catalog, which has the shares of its own; and
factors on the share: slow, likely, fast."""
ATTENTION_SHARES: dict[str | None, tuple[float, float, float]] = {
    "ampere": (0.25, 0.33, 0.46),
    "hopper": (0.145, 0.19, 0.29),
    None: (0.15, 0.25, 0.42),
}
"""Share of the peak that fused attention reaches on what it computes: slow, likely, fast.

Source of the likely ones: the published runs of MPT (benchmarks/public/mpt_fsdp.csv), above all those of 16,384 tokens
and more.
"""
LARGE_PRODUCT_SHARE = 0.77
"""Share of the peak of one product of two 8192² matrices. Measured: 0.76 to 0.79 on one H200 (reports/gpu)."""
FUSED_SHARES = (0.33, 0.55, 0.72)
"""Share of a large product's rate that the fused kernels reach on whole blocks of rows: slow, likely, fast.
Measured: 0.55, forward and backward of Translution at ViT-B/16 with 32 samples on one H200 (reports/gpu); slow and fast
are estimates."""
FUSED_ROWS = 64
"""Rows of a block of the fused kernels (models/ops/fused/configs.py)."""
LATENCY_S = (60e-6, 30e-6, 15e-6)
"""Latency of a collective on one node; each doubling of the nodes adds the same again. Estimates, not measured."""
GPU_OPERATION_S = (12e-6, 6e-6, 4e-6)
"""Seconds to launch one operation from Python."""
GPU_ENGINE_S = {
    "module_s": (600e-6, 420e-6, 150e-6),
    "gradient_s": (600e-6, 300e-6, 150e-6),
    "sub_group_s": (2e-3, 1e-3, 0.5e-3),
}
"""Seconds of ZeRO-3's hooks around one module, and of the engine's work on one gradient and on one sub-group.

The likely ones of modules and gradients are as calibrated on a machine with one H200 (reports/gpu). That of sub-groups,
0.57 ms there, stays, since steps there took longer than predicted. The others are estimates."""
CPU_RATES = {
    "matmul": (15e9, 30e9, 60e9),
    "memory": (3e9, 6e9, 12e9),
    "link": (0.5e9, 1e9, 2e9),
    "adam": (100e6, 200e6, 400e6),
}
"""Rates of a CPU that was not measured: of one core, except for the link."""
HOST_ADAM_ELEMENTS_PER_S, HOST_ADAM_BYTES_PER_S = (1.30e9, 1.75e9, 2.20e9), 409.6e9
"""Parameters that CPU AdamW updates per second on a whole node, and the memory bandwidth of that node.

Published: 1.65e9 on a DGX-2 (DeepSpeed's tutorial of ZeRO-Offload), 1.4e9 (DeepSpeed's pull request 735), 1.8e9 (its
issue 6834), at most 1.7e9 on a node of A100 (ZenFlow's announcement). They differ less than the bandwidths of these
nodes do: other nodes are scaled by its square root.
"""
PAGEABLE_BYTES_PER_S = (2e9, 5e9, 9e9)
"""Bytes per second that the driver copies between pageable host memory and a device, by way of its own pinned buffer.
Estimates, not measured."""
DEVICE_ADAM_BYTES = 28
"""Bytes per element that one fused AdamW kernel would move on the device."""
LOOP_PASSES = 2.5
"""How many times as much as a fused kernel torch's loop of AdamW reads and writes."""
QUANTIZED_PASSES = (0.6, 10.5)
"""The same of bitsandbytes' 8-bit AdamW: on a GPU by the bytes that it moves (16 of 28), not measured; on a CPU 4.2
times torch's loop, measured (bitsandbytes 0.50.2, one and two cores)."""
MEASURED_SPREAD = (1.15, 1.0, 0.9)
"""Factors on measured seconds, by level: the spread between two runs on the same machine."""


class Rates:
    """Rates of one rank while all ranks of its node do the same.

    Args:
        cluster: gives peaks and measured rates.
        precision: precision of matrix products.
        level: slow, likely or fast.
    """

    def __init__(self, cluster: ClusterSpec, precision: Precision, level: RateLevel = "likely") -> None:
        self.cluster, self.precision, self.level = cluster, precision, level
        self._measured = cluster.measured or MeasuredRates()
        self._index = RATE_LEVELS.index(level)
        self._transfers: dict[str, Transfer] = {}

    def check(self) -> None:
        """Check that the cluster has the rates that every step needs.

        Raises:
            InputError: with the name of a missing rate.
        """
        _ = self.peak_flops_per_s, self.memory_bytes_per_s, self.collective("all_gather")

    @property
    def spread(self) -> float:
        """Factor on measured seconds at this level."""
        return MEASURED_SPREAD[self._index]

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on CPUs."""
        return self.cluster.device == "cpu"

    def efficiency(self, what: str) -> float:
        """Return the fraction of a peak that is reached at this level; ``what`` is a key of `EFFICIENCIES`."""
        return EFFICIENCIES[what][self._index]

    @property
    def cores(self) -> float:
        """CPU cores per rank."""
        return (self.cluster.host_cores or self.cluster.ranks_per_node) / self.cluster.ranks_per_node

    def points(self) -> tuple[MatmulRate, ...]:
        """Return the measured products of this precision."""
        return tuple(point for point in self._measured.matmul if point.precision == self.precision)

    @cached_property
    def peak_flops_per_s(self) -> float:
        """Peak FLOP/s of one rank; for a CPU the highest measured rate, or an estimate.

        Raises:
            InputError: if the cluster lacks the rate.
        """
        points = self.points()
        if points:
            return max(point.flops_per_s for point in points)
        if self.on_cpu:
            return CPU_RATES["matmul"][2] * self.cores
        field = "tf32_flops_per_s" if self.precision == "fp32" else f"{self.precision}_flops_per_s"
        value = getattr(self.cluster, field)
        if value is None and field == "tf32_flops_per_s":
            # A GPU without TF32 computes fp32 products as such.
            value = self.cluster.fp32_flops_per_s
        if value is None and self.cluster.gpu and self.precision == "bf16":
            raise InputError(f"precision: bf16 is not allowed: must be fp16 or fp32 on {self.cluster.gpu}")
        if value is None:
            raise InputError(f"cluster {self.cluster.name!r}: {field}: is required to predict times")
        return float(value)

    def matmul_seconds(self, rows: float, inner: int, cols: int, *, grouped: bool = False) -> float:
        """Return the seconds of one product (rows, inner) by (inner, cols)."""
        flops = 2.0 * rows * inner * cols
        points = self.points()
        if points:
            return self.spread * flops / interpolate(points, rows, math.sqrt(inner * cols))
        if self.on_cpu:
            return flops / (CPU_RATES["matmul"][self._index] * self.cores)
        moved = (rows * (inner + cols) + inner * cols) * DTYPE_BYTES[self.precision]
        share = self.efficiency("grouped") if grouped else self._matmul_share
        flops_per_s = self.peak_flops_per_s * share
        # The first reads and the last writes of a product overlap with nothing.
        return flops / flops_per_s + moved / self.memory_bytes_per_s

    @cached_property
    def has_fused_kernels(self) -> bool:
        """Whether fused kernels compute products of relations, where the widths fit."""
        return self.cluster.has_fused_kernels and DTYPE_BYTES[self.precision] == 2

    def fused_seconds(self, rows: float, inner: int, cols: int) -> float:
        """Return the seconds of one product of a relation's rows in a fused kernel, (rows, inner) by (inner, cols).

        A kernel computes whole blocks of rows and reads the relation's matrix while it multiplies.
        """
        flops = 2.0 * math.ceil(rows / FUSED_ROWS) * FUSED_ROWS * inner * cols
        large = self.peak_flops_per_s * (1 / self.spread if self.points() else LARGE_PRODUCT_SHARE)
        read = inner * cols * DTYPE_BYTES[self.precision] / self.memory_bytes_per_s
        return max(flops / (large * FUSED_SHARES[self._index]), read)

    def attention_seconds(self, rows: float, inner: int, cols: int) -> float:
        """Return the seconds of one of the two products of fused attention, (rows, inner) by (inner, cols)."""
        if self.on_cpu:
            return self.matmul_seconds(rows, inner, cols)
        shares = ATTENTION_SHARES.get(self._gpu.generation if self._gpu else None, ATTENTION_SHARES[None])
        return 2.0 * rows * inner * cols / (self.peak_flops_per_s * shares[self._index])

    @cached_property
    def _gpu(self) -> GpuSpec | None:
        return find_gpu(self.cluster.gpu)[1] if self.cluster.gpu else None

    @cached_property
    def _matmul_share(self) -> float:
        share = self._gpu.matmul_share.value if self._gpu else MATMUL_SHARE
        return min(0.9, share * MATMUL_SPREAD[self._index])

    @cached_property
    def memory_bytes_per_s(self) -> float:
        """Bytes per second that elementwise operations read and write."""
        measured = self._measured.memory_bytes_per_s
        if measured:
            return measured / self.spread
        if self.on_cpu:
            return CPU_RATES["memory"][self._index] * self.cores
        return self._field("memory_bytes_per_s") * self.efficiency("memory")

    def _field(self, name: str) -> float:
        value = getattr(self.cluster, name)
        if value is None:
            raise InputError(f"cluster {self.cluster.name!r}: {name}: is required to predict times")
        return float(value)

    def norm_seconds(self, elements: float) -> float:
        """Return the seconds of the norm of a gradient, which is squared in fp64."""
        measured = self._measured.norm_elements_per_s
        # Without a measured rate: 4 bytes read, 8 written in fp64, 8 read again.
        return elements / (measured / self.spread if measured else self.memory_bytes_per_s / 20)

    @cached_property
    def operation_s(self) -> float:
        """Seconds of one small operation called from Python."""
        measured = self._measured.operation_s
        return GPU_OPERATION_S[self._index] if measured is None else self.spread * measured

    def overhead(self, name: str) -> float:
        """Return the seconds of an engine overhead: ``module_s``, ``gradient_s`` or ``sub_group_s``."""
        measured = getattr(self._measured, name)
        if measured is not None:
            return float(self.spread * measured)
        return GPU_ENGINE_S[name][self._index]

    def collective(self, name: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]) -> Transfer:
        """Return the transfer model of a collective, by the bytes of the full tensor.

        Within a node it runs at the rate of the links; between nodes every node receives the partitions of the others
        over all of its adapters, and every rank of it its own ones in an all-to-all.
        """
        if name not in self._transfers:
            self._transfers[name] = self._collective(name)
        return self._transfers[name]

    def within(self, ranks: int) -> Rates:
        """Return the rates of a group of ranks of one node, while the other groups do the same."""
        update = {"nodes": 1, "ranks_per_node": ranks}
        return Rates(self.cluster.model_copy(update=update), self.precision, self.level)

    def _collective(self, name: str) -> Transfer:
        cluster = self.cluster
        measured: Transfer | None = getattr(self._measured, "all_gather" if name == "all_to_all" else name)
        if measured is not None and cluster.nodes == 1:
            return Transfer(latency_s=measured.latency_s * self.spread, bytes_per_s=measured.bytes_per_s / self.spread)
        if cluster.world_size == 1:
            return Transfer(latency_s=self.operation_s, bytes_per_s=self.memory_bytes_per_s / 2)
        latency, passes = LATENCY_S[self._index], 2 if name == "all_reduce" else 1
        if self.on_cpu:
            return Transfer(latency_s=10 * latency, bytes_per_s=CPU_RATES["link"][self._index] / passes)
        # Seconds per byte, bound by what one rank receives or what its node receives.
        seconds = 0.0
        if cluster.ranks_per_node > 1:
            received = (cluster.world_size - 1) / cluster.world_size
            seconds = received / (self._field("intra_node_bytes_per_s") * self.efficiency("link"))
        if cluster.nodes > 1:
            adapters = self._field("nic_bytes_per_s") * (cluster.nics or 1) * self.efficiency("network")
            receivers = cluster.ranks_per_node if name == "all_to_all" else 1
            seconds = max(seconds, receivers * (cluster.nodes - 1) / cluster.nodes / adapters)
            latency *= 1 + math.log2(cluster.nodes)
        return Transfer(latency_s=latency, bytes_per_s=1 / (seconds * passes))

    def host_copy(self, direction: Literal["host_to_device", "device_to_host"], *, pinned: bool = True) -> Transfer:
        """Return the transfer model of copies between the host and one device while all devices of the node copy."""
        key = f"{direction} {pinned}"
        if key not in self._transfers:
            self._transfers[key] = self._host_copy(direction, pinned=pinned)
        return self._transfers[key]

    def _host_copy(self, direction: str, *, pinned: bool) -> Transfer:
        measured: Transfer | None = getattr(self._measured, direction)
        if measured is not None:
            return Transfer(latency_s=measured.latency_s * self.spread, bytes_per_s=measured.bytes_per_s / self.spread)
        if self.on_cpu:
            # The device is the host: a copy reads and writes the same memory.
            return Transfer(latency_s=self.operation_s, bytes_per_s=self.memory_bytes_per_s / 2)
        rate = self._field("pcie_bytes_per_s") * self.efficiency("pcie")
        rate = rate if pinned else min(rate, PAGEABLE_BYTES_PER_S[self._index])
        shared = self._field("host_memory_bytes_per_s") * self.efficiency("host") / self.cluster.ranks_per_node
        return Transfer(latency_s=10e-6, bytes_per_s=min(rate, shared))

    @cached_property
    def host_adam_elements_per_s(self) -> float:
        """Elements per second that CPU AdamW updates on one rank while all ranks of the node update."""
        measured = self._measured.host_adam_elements_per_s
        if measured:
            return measured / self.spread
        if self.on_cpu:
            return CPU_RATES["adam"][self._index] * self.cores
        faster = math.sqrt(self._field("host_memory_bytes_per_s") / HOST_ADAM_BYTES_PER_S)
        return HOST_ADAM_ELEMENTS_PER_S[self._index] * faster / self.cluster.ranks_per_node

    def device_adam_elements_per_s(self, adam: str) -> float:
        """Elements per second that AdamW updates on the device.

        Args:
            adam: what updates them, a value of ``TrainingSpec.adam``.
        """
        passes = {"fused": 1.0, "torch": 1.0, "8bit": QUANTIZED_PASSES[self.on_cpu]}.get(adam, LOOP_PASSES)
        measured = self._measured.device_adam_elements_per_s
        if measured:
            # Measured with the fused kernel on a GPU, and with the loop on a CPU.
            return measured / self.spread * (LOOP_PASSES if self.on_cpu else 1.0) / passes
        return self.memory_bytes_per_s / (DEVICE_ADAM_BYTES * passes)

    def nvme_bytes_per_s(self, direction: Literal["read", "write"]) -> float:
        """Return one rank's share of the bandwidth of its node's drives.

        Raises:
            InputError: if the cluster lacks the rate.
        """
        name = f"nvme_{direction}_bytes_per_s"
        measured = getattr(self._measured, name)
        if measured:
            return float(measured / self.spread / self.cluster.ranks_per_node)
        if self.on_cpu and getattr(self.cluster, name) is None:
            return 0.5e9 * self.efficiency("nvme") / self.cluster.ranks_per_node
        return self._field(name) * self.efficiency("nvme") / self.cluster.ranks_per_node
