"""DeepSpeed's ops are compiled once, one after the other, and nobody waits without a word."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_ops import FakeOps, compilers
from helpers.runs import write_plan
from torch.utils.file_baton import FileBaton

from translution.distributed.system import compiled_ops as ops
from translution.distributed.system.compile_times import OPS, OpDuration, estimate_seconds
from translution.distributed.system.compiled_ops import COMPILE_SECONDS, needed_ops, remove_stale_locks
from translution.distributed.system.op_records import extensions_folder, record_path
from translution.planner.common.errors import RunFailedError
from translution.planner.common.machine import usable_cores
from translution.planner.plans.plan import Plan, load_plan


def test_only_a_lock_that_no_process_holds_is_removed(tmp_path: Path) -> None:
    """A killed compilation leaves its lock, and every later run would wait for it forever."""
    for name in ("killed", "compiling"):
        (tmp_path / name).mkdir()
    stale, held = tmp_path / "killed" / "lock", tmp_path / "compiling" / "lock"
    batons = [FileBaton(str(path)) for path in (stale, held)]
    assert all(baton.try_acquire() for baton in batons)
    os.close(batons[0].fd)
    assert remove_stale_locks({"TORCH_EXTENSIONS_DIR": str(tmp_path)}) == [stale]
    assert not stale.exists()
    assert held.exists()
    batons[1].release()


class Compiled:
    """Compiles ops with the stand-in and keeps the messages.

    Args:
        fakes: the stand-in.
    """

    def __init__(self, fakes: FakeOps) -> None:
        self.fakes, self.messages = fakes, list[str]()
        self.log = fakes.root / "log"

    def __call__(
        self, *names: str, on_message: Callable[[str], None] = lambda _: None, **environment: str
    ) -> list[str]:
        """Prepare ops; return the names of those that a process has loaded, in their order."""
        before = len(self.fakes.loaded())

        def keep(text: str) -> None:
            self.messages.append(text)
            on_message(text)

        ops.prepare_ops(names, environment, self.log, keep)
        return [line.split()[0] for line in self.fakes.loaded()[before:]]

    def said(self) -> list[str]:
        """Return the messages since the last call."""
        texts, self.messages = self.messages, []
        return texts

    def record(self) -> dict[str, Any]:
        """Return the record of this environment in the folder of ops."""
        return json.loads(record_path(os.environ).read_text())


@pytest.fixture
def prepare(fake_ops: FakeOps) -> Compiled:
    return Compiled(fake_ops)


def without_seconds(texts: list[str]) -> list[str]:
    return [re.sub(r"\d+ (s|min)\b", "# s", text) for text in texts]


def test_compiled_ops_are_not_loaded_again(prepare: Compiled, fake_ops: FakeOps) -> None:
    adam, io = "CPUAdamBuilder", "AsyncIOBuilder"
    assert prepare(adam) == [adam]
    assert prepare(adam) == []
    assert prepare(adam, io) == [io]
    assert prepare(io) == prepare(adam) == []
    os.utime(fake_ops.library(adam), ns=(1, 1))  # Another process has compiled it again.
    assert prepare(adam) == [adam]
    assert prepare(adam) == []
    fake_ops.library(adam).unlink()
    assert prepare(adam) == [adam]
    record_path(os.environ).write_text("{")
    assert prepare(adam) == [adam]


def test_environments_that_share_the_folder_keep_their_own_records(prepare: Compiled) -> None:
    adam, io = "CPUAdamBuilder", "AsyncIOBuilder"
    for _ in range(2):
        loaded = [prepare(adam), prepare(adam, io, CXX="another"), prepare(adam, io, CXX="a third")]
    assert loaded == [[], [], []]


def test_an_environment_without_times_takes_those_of_another_on_this_machine(
    prepare: Compiled, fake_ops: FakeOps
) -> None:
    adam = "CPUAdamBuilder"
    prepare(adam)
    fake_ops.library(adam).unlink()
    prepare.said()
    prepare(adam, CXX="another")
    assert " as before on this machine; " in prepare.said()[0]


def test_an_op_that_another_process_compiles_leaves_the_others_compiled(prepare: Compiled, fake_ops: FakeOps) -> None:
    assert prepare("CPUAdamBuilder", "ShareMemCommBuilder") == ["CPUAdamBuilder", "ShareMemCommBuilder"]
    os.utime(fake_ops.library("ShareMemCommBuilder"), ns=(1, 1))
    assert prepare("CPUAdamBuilder", "ShareMemCommBuilder") == ["ShareMemCommBuilder"]
    assert prepare("CPUAdamBuilder", "ShareMemCommBuilder") == []


def test_each_op_is_announced_with_an_estimate_and_compiled_once(prepare: Compiled, fake_ops: FakeOps) -> None:
    names = ("ShareMemCommBuilder", "CPUAdamBuilder")
    assert prepare(*names) == [*names]
    cores = usable_cores()
    idle = f"{cores} idle core{'s' if cores > 1 else ''}"
    expected = [estimate_seconds(name, cores) for name in names]
    first = f"compiling DeepSpeed's ShareMemComm (1 of 2): about {expected[0]:.0f} s on {idle}; "
    texts = prepare.said()
    assert without_seconds(texts) == without_seconds(
        [
            f"{first}kept in {fake_ops.extensions}",
            "compiled ShareMemComm in 0 s",
            f"compiling DeepSpeed's CPUAdam (2 of 2): about 0 s on {idle}; kept in {fake_ops.extensions}",
            "compiled CPUAdam in 0 s",
        ]
    )
    assert ops.format_seconds(expected[0]) in texts[0]
    assert [line.split()[1] for line in fake_ops.loaded()] == [str(cores)] * 2
    assert prepare(*names) == []
    assert prepare.said() == []


def test_the_time_that_this_machine_took_replaces_the_estimate(prepare: Compiled, fake_ops: FakeOps) -> None:
    name = "CPUAdamBuilder"
    prepare(name)
    took = prepare.record()["seconds"][name]
    assert took["jobs"] == usable_cores()
    assert 0 < took["seconds"] < COMPILE_SECONDS
    path = record_path(os.environ)
    record = prepare.record() | {"seconds": {name: {"seconds": 77.0, "jobs": usable_cores()}}}
    path.write_text(json.dumps(record))
    fake_ops.library(name).unlink()
    prepare.said()
    prepare(name)
    assert prepare.said()[0] == (
        f"compiling DeepSpeed's CPUAdam (1 of 1): about 77 s as before on this machine; kept in {fake_ops.extensions}"
    )
    assert prepare.record()["seconds"][name]["seconds"] < 77
    # Another machine with the same home folder takes another time.
    record["made_with"]["node"] = "elsewhere"
    path.write_text(json.dumps(record))
    fake_ops.library(name).unlink()
    prepare(name)
    assert " idle core" in prepare.said()[0]


def test_what_is_loaded_without_being_compiled_is_silent_and_leaves_no_time(
    prepare: Compiled, fake_ops: FakeOps
) -> None:
    fake_ops.library("CPUAdamBuilder").parent.mkdir()
    fake_ops.library("CPUAdamBuilder").touch()
    assert prepare("CPUAdamBuilder") == ["CPUAdamBuilder"]
    assert prepare.said() == []
    assert prepare.record()["seconds"] == {}


def test_a_long_compilation_is_reported_again_and_again(
    prepare: Compiled, fake_ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "MESSAGE_SECONDS", 0.05)
    monkeypatch.setattr(ops, "COMPILE_SECONDS", 60.0)
    fifo = fake_ops.block("CPUAdamBuilder")

    def release(_: str) -> None:
        if len(prepare.messages) == 3:
            fifo.write_text("")

    prepare("CPUAdamBuilder", on_message=release)
    texts = without_seconds(prepare.said())
    assert texts[1] == texts[2] == "still compiling CPUAdam after # s"
    assert texts[-1] == "compiled CPUAdam in # s"


def test_an_op_whose_library_exists_is_announced_only_when_it_takes_long(
    prepare: Compiled, fake_ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "UNANNOUNCED_SECONDS", 0.05)
    monkeypatch.setattr(ops, "COMPILE_SECONDS", 60.0)
    fake_ops.library("CPUAdamBuilder").parent.mkdir()
    fake_ops.library("CPUAdamBuilder").touch()
    fifo = fake_ops.block("CPUAdamBuilder")
    prepare("CPUAdamBuilder", on_message=lambda text: fifo.write_text("") if text.startswith("compiling") else None)
    texts = prepare.said()
    assert texts[0].startswith("compiling DeepSpeed's CPUAdam (1 of 1): about ")
    assert without_seconds(texts[1:]) == ["CPUAdam was compiled already; it was loaded in # s"]


def test_a_failing_op_names_itself_and_the_log_and_the_others_stay_compiled(
    prepare: Compiled, fake_ops: FakeOps
) -> None:
    fake_ops.fail("CPUAdamBuilder")
    with pytest.raises(RunFailedError) as error:
        prepare("ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder")
    assert str(error.value) == f"DeepSpeed's ops do not compile: CPUAdamBuilder (log: {prepare.log})"
    assert "no such header" in prepare.log.read_text()
    assert prepare.record()["ops"] == ["ShareMemCommBuilder"]
    fake_ops.fail()
    assert prepare("ShareMemCommBuilder", "CPUAdamBuilder") == ["CPUAdamBuilder"]


def test_an_op_that_takes_too_long_names_itself_and_its_process_ends(
    prepare: Compiled, fake_ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "COMPILE_SECONDS", 0.2)
    fake_ops.block("CPUAdamBuilder")
    with pytest.raises(RunFailedError, match=r"did not compile in 0 s: CPUAdamBuilder: .* lock under .* \(log: "):
        prepare("CPUAdamBuilder")
    assert compilers(fake_ops.extensions) == []


def test_a_launch_says_whose_compilation_it_waits_for(
    prepare: Compiled, fake_ops: FakeOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "MESSAGE_SECONDS", 0.05)
    monkeypatch.setattr(ops, "COMPILE_SECONDS", 60.0)
    fifo, lock = fake_ops.block("CPUAdamBuilder"), fake_ops.library("CPUAdamBuilder").parent / "lock"
    lock.parent.mkdir()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()

    def release(_: str) -> None:
        if len(prepare.messages) == 2:
            baton.release()
            fifo.write_text("")

    prepare("CPUAdamBuilder", on_message=release)
    texts = without_seconds(prepare.said())
    waiting = f"waiting for process {os.getpid()}, which compiles CPUAdam"
    assert texts[:2] == [waiting, f"still {waiting}, after # s"]
    assert texts[-1] == "CPUAdam is compiled, after waiting; it was loaded in # s"
    assert prepare.record()["seconds"] == {}


def test_the_number_of_jobs_is_at_most_the_usable_cores(prepare: Compiled, fake_ops: FakeOps) -> None:
    prepare("CPUAdamBuilder", MAX_JOBS="1")
    prepare("ShareMemCommBuilder", MAX_JOBS="100000")
    prepare("CPULionBuilder", MAX_JOBS="many")
    assert [line.split()[1] for line in fake_ops.loaded()] == ["1", str(usable_cores()), str(usable_cores())]


def plan_with(tmp_path: Path, *, device: str = "cpu", ranks: int = 1, offload: str = "none", **training: Any) -> Plan:
    nvme = tmp_path if "nvme" in offload else None
    plan = load_plan(write_plan(tmp_path / "plan", ranks, offload=offload, nvme_path=nvme, force=True))
    return plan.model_copy(
        update={
            "cluster": plan.cluster.model_copy(update={"device": device}),
            "training": plan.training.model_copy(update=training),
        }
    )


def test_a_plan_needs_what_its_ranks_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "ShareMemCommBuilder"
    for device, communication in (("cpu", [shared]), ("cuda", [])):
        for optimizer, op in (("adamw", "CPUAdam"), ("lion", "CPULion"), ("adagrad", "CPUAdagrad"), ("sgd", None)):
            plan = plan_with(tmp_path, device=device, offload="cpu-optimizer", optimizer=optimizer)
            assert list(needed_ops(plan)) == communication + [f"{op}Builder"] * (op is not None)
        assert list(needed_ops(plan_with(tmp_path, device=device, ranks=2))) == communication
        nvme = plan_with(tmp_path, device=device, offload="nvme-optimizer")
        assert list(needed_ops(nvme)) == [*communication, "CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"]
    assert needed_ops(plan_with(tmp_path, device="cuda", optimizer="lion")) == ("FusedLionBuilder",)
    assert needed_ops(plan_with(tmp_path, device="cuda", optimizer="adagrad")) == ()
    fused = plan_with(tmp_path, device="cuda", adam="fused")
    for found, needed in ((True, ("FusedAdamBuilder",)), (False, ())):
        monkeypatch.setattr(ops, "has_gpu_compiler", lambda found=found: found)
        assert needed_ops(fused) == needed
    assert needed_ops(plan_with(tmp_path, device="cuda", adam="torch")) == ()


def test_a_gpu_compiler_is_found_on_the_path_or_in_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_PATH", "ROCM_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert ops.has_gpu_compiler()


def test_the_builders_and_libraries_are_those_of_deepspeed() -> None:
    from deepspeed.ops.op_builder import cpu
    from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
    from deepspeed.ops.op_builder.fused_lion import FusedLionBuilder

    fused = {"FusedAdamBuilder": FusedAdamBuilder, "FusedLionBuilder": FusedLionBuilder}
    for name, source in OPS.items():
        builder = fused.get(name) or getattr(cpu, name)
        assert source.library == builder.NAME


def test_more_jobs_take_less_time_until_the_longest_file() -> None:
    for op, source in OPS.items():
        if source.total_s is None:
            assert estimate_seconds(op, 2) is None
            assert estimate_seconds(op, 2, OpDuration(seconds=300, jobs=8)) == 300
            continue
        assert 0 < source.longest_s <= source.total_s
        one, many = estimate_seconds(op, 1), estimate_seconds(op, 64)
        assert one is not None
        assert many is not None
        assert source.longest_s < many <= one
        assert (many < one) == (source.longest_s < source.total_s)
        assert estimate_seconds(op, 1, OpDuration(seconds=2 * many, jobs=64)) == pytest.approx(2 * one)
        assert estimate_seconds(op, 64, OpDuration(seconds=2 * many, jobs=64)) == pytest.approx(2 * many)


def test_the_folder_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for cache in (None, str(tmp_path)):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if cache is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert str(extensions_folder()) == get_default_build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "own"))
    assert extensions_folder() == tmp_path / "own"
