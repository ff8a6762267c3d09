"""Checks of one machine that find problems before any rank starts."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from translution.planner.common import InputError, Schema, Tier, TranslutionError, available_memory_bytes, format_bytes
from translution.planner.costs import count_parameters
from translution.planner.plans import PLAN_FILE, RUNS, Plan, load_plan

from ..system import nvme_swap
from ..system.compile_times import format_seconds
from ..system.compiled_ops import missing_ops, needed_ops, op_name, remove_stale_locks, shown_folder
from ..system.environment import launch_environment
from ..system.filesystem import file_system, remove_dead_buffers

SHARED_BUFFER_BYTES = 69_206_024
"""Bytes that each CPU rank needs in /dev/shm. Source: DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp."""
_STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: its fp32 master copy and two moments."""
_SPEED_MIB = 64
"""MiB written and read for a rough estimate of a drive's speed; `calibrate` measures it properly."""
_MEMORY_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


class Check(Schema):
    """Result of one check."""

    name: str
    """What was checked."""
    passed: bool
    """True if it does not keep the plan from running."""
    text: str
    """What was found; for a failed check also what is needed and how to fix it."""


def _room(name: str, needed: int, free: int, advice: str) -> Check:
    text = f"{format_bytes(needed)} needed, {format_bytes(free)} free"
    return Check(name=name, passed=needed <= free, text=text if needed <= free else f"{text}: {advice}")


def _memory(plan: Plan) -> Iterator[Check]:
    cluster, prediction = plan.cluster, plan.prediction
    needed = prediction.host_bytes * cluster.ranks_per_node
    yield _room("host memory", needed, available_memory_bytes(), "end other programs, or plan with less host memory")
    if cluster.device == "cpu":
        needed = SHARED_BUFFER_BYTES * cluster.ranks_per_node
        yield _room("/dev/shm", needed, shutil.disk_usage("/dev/shm").free, "enlarge it, or remove files from it")
        return
    for number, free in enumerate(_free_gpu_bytes(cluster.ranks_per_node)):
        yield _room(f"GPU {number}", prediction.peak_bytes, free, "end other programs on it, or plan with less memory")


_FREE_BYTES = """
import sys, torch
for number in range(min(int(sys.argv[1]), torch.cuda.device_count())):
    print(torch.cuda.mem_get_info(number)[0])
"""


def _free_gpu_bytes(count: int) -> list[int]:
    """Return the free bytes of the first GPUs, at most ``count``.

    A process that asks the driver holds a context of some 500 MiB on each GPU until it ends. The launcher stays while
    its ranks run, so another process asks.
    """
    done = subprocess.run([sys.executable, "-c", _FREE_BYTES, str(count)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"GPUs: their free memory cannot be read: {lines[-1][:300]}")
    return [int(line) for line in done.stdout.split()]


def _buffers() -> Check:
    """Remove the buffers of dead ranks from shared memory, and tell how many there were."""
    removed = remove_dead_buffers()
    text = f"removed {len(removed)} stale buffer{'s' * (len(removed) > 1)}, {format_bytes(sum(removed))}"
    return Check(name="shared memory", passed=True, text=text if removed else "no stale buffer")


def _nvme_paths(plan: Plan) -> set[Path]:
    offloads = (plan.zero.offload_optimizer, plan.zero.offload_param)
    return {Path(str(offload.nvme_path)) for offload in offloads if offload.nvme_path is not None}


def _earlier_nvme(plan: Plan, plan_folder: Path) -> Iterator[Check]:
    """Remove what dead runs of this plan folder have left on NVMe drives that the plan no longer uses."""
    known: set[Path] = set()
    for path in (plan_folder / RUNS).glob(f"*/{PLAN_FILE}"):
        with contextlib.suppress(TranslutionError):  # Written by another version.
            known |= _nvme_paths(load_plan(path.parent))
    for path in sorted(known - _nvme_paths(plan)):
        if stale := nvme_swap.stale_bytes(path):
            nvme_swap.remove_stale(path)
            text = f"removed {format_bytes(stale)} that dead runs left"
            yield Check(name=f"NVMe folder {path}", passed=True, text=text)


def _locked(plan: Plan) -> Iterator[Check]:
    """Check the limit of locked memory: DeepSpeed locks its NVMe buffers, and aborts silently if it may not."""
    needed, (limit, _) = plan.prediction.highest(Tier.PINNED), resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and limit != resource.RLIM_INFINITY:
        yield _room("locked memory", needed, limit, "raise it: ulimit -l unlimited")


def _new_swap_bytes(plan: Plan, path: Path) -> int:
    """Return the bytes that swap files need besides those that dead runs have left, which are deleted first."""
    needed = plan.prediction.highest(Tier.NVME) * plan.cluster.ranks_per_node
    return max(0, needed - nvme_swap.stale_bytes(path))


def _nvme(plan: Plan, path: Path) -> Iterator[Check]:
    name = f"NVMe folder {path}"
    if not path.is_dir():
        yield Check(name=name, passed=False, text=f"is not a folder: create it (mkdir -p {path}) or plan with another")
        return
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        yield Check(name=name, passed=False, text=f"cannot be written ({error.strerror}): change its permissions")
        return
    kind = file_system(path)
    if kind in _MEMORY_SYSTEMS:
        yield Check(name=name, passed=False, text=f"is in memory ({kind}): plan with a folder on a drive")
        return
    needed = _new_swap_bytes(plan, path)
    room = _room(name, needed, shutil.disk_usage(path).free, "free space, or plan with another drive")
    yield room
    if others := nvme_swap.living_owners(path):
        text = f"other runs use it too, and its bandwidth: {'; '.join(others[:3])}"
        yield Check(name=name, passed=True, text=text)
    if room.passed:
        yield _speed(plan, path)


def _speed(plan: Plan, path: Path) -> Check:
    """Measure the drive's speed roughly and compare it with the plan's; this check always passes."""
    name = f"NVMe speed of {path}"
    block = memoryview(bytes(2**20))
    try:
        with tempfile.TemporaryFile(dir=path, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(_SPEED_MIB):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            while file.read(2**20):
                pass
            read = time.perf_counter()
    except OSError as error:
        return Check(name=name, passed=True, text=f"could not be measured: {error.strerror}")
    rates = {"written": written - began, "read": read - written}
    cluster = plan.cluster
    planned = {"written": cluster.nvme_write_bytes_per_s, "read": cluster.nvme_read_bytes_per_s}
    texts = []
    for what, seconds in rates.items():
        rate = planned[what]
        comparison = f" (planned with {format_bytes(round(rate))})" if rate else ""
        texts.append(f"{format_bytes(round(_SPEED_MIB * 2**20 / seconds))} {what} per second{comparison}")
    return Check(name=name, passed=True, text=", ".join(texts))


def _data(plan: Plan) -> Check:
    """Open the data here: every rank would find the same problem, but only after waiting for the others."""
    from ..data.loaders import load_samples

    try:
        training, held_out = load_samples(
            plan.model, plan.training, plan.training.global_batch(plan.cluster.world_size)
        )
    except TranslutionError as error:
        return Check(name="data", passed=False, text=str(error))
    needed = plan.training.global_batch(plan.cluster.world_size)
    if needed > len(training):
        text = f"{len(training)} samples to train on: a step takes {needed}; plan with a smaller batch"
        return Check(name="data", passed=False, text=text)
    return Check(name="data", passed=True, text=f"{len(training)} samples to train on, {len(held_out)} held out")


def _are(ops: Sequence[str]) -> str:
    """Return the names of ops and a verb: ``CPUAdam is``, ``ShareMemComm, CPUAdam are``."""
    return f"{', '.join(map(op_name, ops))} {'is' if len(ops) == 1 else 'are'}"


def _ops(plan: Plan, plan_folder: Path) -> Check:
    """Tell which of the plan's ops are compiled; this check always passes, because `launch` compiles the others."""
    ops, environment = needed_ops(plan), {**os.environ, **launch_environment(plan.cluster)}
    missing, folder = missing_ops(ops, environment), shown_folder(environment)
    if not missing:
        text = f"{_are(ops)} compiled, in {folder}" if ops else "the plan needs none"
        return Check(name="ops", passed=True, text=text)
    new, old = ([op.op for op in missing if op.has_library is has_library] for has_library in (False, True))
    found = [f"{_are(new)} not compiled yet"] if new else []
    found += [f"{_are(old)} compiled, but perhaps with other versions"] if old else []
    estimates = [op.seconds for op in missing if op.seconds is not None]
    duration = f"about {format_seconds(sum(estimates))}" if len(estimates) == len(missing) else "minutes"
    command = f"translution preflight {shlex.quote(str(plan_folder))}"
    command += " --hostfile HOSTFILE --compile" if plan.cluster.nodes > 1 else " --compile"
    advice = f"`{command}` compiles {'it' if len(missing) == 1 else 'them'} in {duration}, into {folder}"
    return Check(name="ops", passed=True, text=f"{', '.join(found)}; {advice}")


def _count_checkpoints(plan: Plan) -> int:
    """Return how many checkpoints exist at once: the newest is complete before the oldest is removed."""
    training = plan.training
    limit = training.keep_checkpoints + 1 + training.keep_best
    if training.checkpoint_minutes:
        return limit

    def within(interval: int) -> int:
        return (training.steps - 1) // interval if interval else 0

    saved = within(training.checkpoint_steps) + (within(training.evaluation_steps) + 1 if training.keep_best else 0)
    # A run that is stopped saves once more.
    return min(limit, saved + training.final_checkpoint or 1)


def _checkpoints(plan: Plan, plan_folder: Path, saved_bytes: int) -> Check:
    """Check the room for checkpoints besides one that exists, together with swap files that lie on the same drive."""
    count = _count_checkpoints(plan)
    needed = max(0, count_parameters(plan.model).total * _STATE_BYTES * count - saved_bytes)
    name = f"disk for {count} checkpoint{'s' if count > 1 else ''}"
    device = plan_folder.stat().st_dev
    same = [path for path in _nvme_paths(plan) if path.is_dir() and path.stat().st_dev == device]
    if same:
        needed += _new_swap_bytes(plan, same[0])
        name += " and the NVMe folder, which are on one drive"
    advice = "free space, use another drive, or save less (keep_checkpoints, checkpoint_steps, final_checkpoint)"
    return _room(name, needed, shutil.disk_usage(plan_folder).free, advice)


def check_node(plan: Plan, plan_folder: Path, saved_bytes: int = 0) -> list[Check]:
    """Check this machine's memory, drives, data and compiled ops for the ranks of one node.

    What dead ranks have left is removed first: buffers in shared memory, swap files of earlier runs of the plan folder,
    and stale locks of compiled ops.

    Args:
        plan: the plan to run.
        plan_folder: its folder, where its runs and their checkpoints will be written.
        saved_bytes: bytes of the checkpoint that the run resumes from, which the disk holds already.
    """
    checks = [_buffers(), *_earlier_nvme(plan, plan_folder), *_memory(plan)]
    if plan.training.data_path is not None:
        checks.append(_data(plan))
    if plan.zero.uses_nvme:
        checks += _locked(plan)
    for path in _nvme_paths(plan):
        checks += _nvme(plan, path)
    checks.append(_checkpoints(plan, plan_folder, saved_bytes))
    removed = remove_stale_locks()
    text = f"removed {len(removed)} that killed compilations left" if removed else "none is stale"
    checks.append(Check(name="locks of compiled ops", passed=True, text=text))
    checks.append(_ops(plan, plan_folder))
    return checks


def require_passed(checks: Sequence[Check], plan_folder: Path, *, force: bool) -> list[Check]:
    """Raise an error if a check failed, or return the failed checks if the ranks are to start anyway.

    Args:
        checks: the results.
        plan_folder: the plan's folder, for the message.
        force: start anyway.

    Raises:
        InputError: names the first failed check, unless `force` is set.
    """
    failed = [check for check in checks if not check.passed]
    if failed and not force:
        more = f" (and {len(failed) - 1} more: translution preflight {plan_folder})" if len(failed) > 1 else ""
        raise InputError(f"{failed[0].name}: {failed[0].text}{more}; --force starts anyway")
    return failed
