"""Patches to DeepSpeed that can be seen without ranks; tests/integration/test_offload.py trains with those of NVMe."""

from __future__ import annotations

import atexit
import gc
import platform
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cpuinfo
import pytest
import torch

from translution.distributed.training.deepspeed_fixes import (
    answer_for_processor,
    ask_numa_once,
    freeze_imports,
    is_aligned,
    probe_one_op,
    read_file,
    settled_collectives,
)


def test_a_file_is_read_into_an_unaligned_part_of_a_buffer(tmp_path: Path) -> None:
    values = torch.randn(5000)
    path = tmp_path / "gradient"
    path.write_bytes(values.numpy().tobytes())
    # Allocations are not page-aligned in general, so the aligned offset is computed.
    buffer = torch.full((8192,), torch.nan)
    start = (-buffer.data_ptr() % 4096) // 4
    assert is_aligned(buffer[start:])
    assert not is_aligned(buffer[start + 1 :])
    read_file(str(path), buffer[start + 1 : start + 5001])
    assert torch.equal(buffer[start + 1 : start + 5001], values)
    assert buffer[: start + 1].isnan().all()
    assert buffer[start + 5001 :].isnan().all()


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "gradient"
    path.write_bytes(bytes(100))
    with pytest.raises(OSError, match=f"{path}: ends after 100 of 400 bytes"):
        read_file(str(path), torch.empty(100))


@pytest.mark.parametrize("text", [None, "processor : 0\n", "flags\t\t: fpu avx2\n"], ids=["none", "no flags", "flags"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_processor_is_described_once(
    machine: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "cpuinfo", list[None]()
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: asked.append(None) or {"arch": "known"})
    read = machine == "x86_64" and text is not None and "flags" in text
    for _ in range(2):
        answer_for_processor(path)
        assert cpuinfo.get_cpu_info() == ({"arch": "X86_64", "flags": ["avx2", "fpu"]} if read else {"arch": "known"})
    assert len(asked) == (0 if read else 1)


def test_the_answer_for_this_processor_compiles_the_same_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    assert builder is not None
    expected = builder.cpu_arch(), builder.simd_width()
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"arch": "PPC_64", "flags": []})
    assert (builder.cpu_arch(), builder.simd_width()) != expected
    answer_for_processor()
    assert (builder.cpu_arch(), builder.simd_width()) == expected


def test_the_cores_of_numa_nodes_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import numa

    asked = list[list[str]]()
    text = b"available: 3 nodes (0-2)\nnode 0 cpus: 0 1\nnode 1 cpus: 2 3\nnode 2 cpus:\n"
    patched = SimpleNamespace(**vars(subprocess) | {"check_output": lambda words: asked.append(words) or text})
    monkeypatch.setattr(numa, "subprocess", patched)
    monkeypatch.setattr(numa, "get_numa_cores", getattr(numa.get_numa_cores, "__wrapped__", numa.get_numa_cores))
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    for _ in range(2):
        ask_numa_once()
        assert get_accelerator().device_count() == 2
    assert asked == [["numactl", "--hardware"]]


def test_only_the_op_of_communication_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import builder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    probed = list[str]()
    monkeypatch.setattr(builder, "probe_is_compatible", lambda op: probed.append(op.NAME) or True)
    monkeypatch.setattr(ShareMemCommBuilder, "load", lambda _: "loaded")
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {})
    assert build_shm_op() is None
    del deepspeed.ops.__compatible_ops__
    for _ in range(2):
        probe_one_op()
        assert build_shm_op() == "loaded"
    assert probed == [ShareMemCommBuilder.NAME]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_collective_ends_once_no_other_thread_refers_to_its_tensors(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.comm.torch import TorchBackend

    held: list[torch.Tensor] = []
    timers: list[threading.Timer] = []

    class Work:
        """Holds the tensor, as the handle of a collective does."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor[:3]

        def wait(self) -> None:
            timers.append(threading.Timer(0.1, held.clear))
            timers[0].start()

    def broadcast(_: object, tensor: torch.Tensor, async_op: bool = False) -> Work | None:
        held.extend(tensor[:2] for _ in range(8))
        work = Work(tensor)
        return work if async_op else work.wait()

    monkeypatch.setattr(TorchBackend, "broadcast", broadcast)
    tensor = torch.zeros(4)
    with settled_collectives():
        handle = TorchBackend.broadcast(None, tensor, async_op=asynchronous)
        assert not held
    timers[0].join()
    assert (handle is not None) is asynchronous
    if handle is not None:
        handle.wait()
    assert TorchBackend.broadcast is broadcast


def test_muon_is_imported_without_torchs_compiler() -> None:
    program = """
import sys
from deepspeed.runtime import compiler
from translution.distributed.training.deepspeed_fixes import import_muon_uncompiled
before = compiler.compile
import_muon_uncompiled()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert compiler.compile is before
print(MuonWithAuxAdam.__name__, *({"torch._dynamo", "torch._inductor.compile_fx"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "MuonWithAuxAdam"


def test_a_rank_ends_without_tritons_reports_of_leaks() -> None:
    """Triton 3.9 and newer print what is not collected at exit; older ones never do."""
    program = "from translution.distributed.training.deepspeed_fixes import freeze_imports\nfreeze_imports()\n"
    done = subprocess.run(
        [sys.executable, "-c", "import triton\n" + program], capture_output=True, text=True, check=True
    )
    assert "leaked" not in done.stderr


@pytest.mark.parametrize("kind", ["nanobind", "pybind11_builtins"])
def test_imports_are_collected_at_exit_where_triton_reports_what_is_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = type("Meta", (type,), {"__module__": kind})("location", (), {})
    monkeypatch.setitem(sys.modules, "triton._C.libtriton", SimpleNamespace(ir=SimpleNamespace(location=location)))  # type: ignore[misc]
    at_exit = list[object]()
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    freeze_imports()
    assert at_exit == ([gc.unfreeze] if kind == "nanobind" else [])
