"""DeepSpeed's compiled ops: which a plan needs, and compiling them once before ranks would race for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from translution.planner.errors import RunFailedError
from translution.planner.plan import Plan

_COMPILE = """
import sys
from deepspeed.accelerator import get_accelerator
for name in sys.argv[1:]:
    builder = get_accelerator().create_op_builder(name)
    if builder is not None:
        builder.load()
"""
COMPILE_SECONDS = 900.0
"""How long one op may take: the longest, for NVMe, takes four minutes on two quiet cores."""
_OPTIMIZERS = {"adamw": "CPUAdamBuilder", "lion": "CPULionBuilder", "adagrad": "CPUAdagradBuilder"}


def needed_ops(plan: Plan) -> tuple[str, ...]:
    """Names of the builders of what a plan's ranks load."""
    zero = plan.zero
    ops = ["ShareMemCommBuilder"] if plan.cluster.device == "cpu" else []
    if zero.offload_optimizer.device != "none" and plan.training.optimizer in _OPTIMIZERS:
        ops.append(_OPTIMIZERS[plan.training.optimizer])
    if zero.uses_nvme:
        ops.append("AsyncIOBuilder")
    return tuple(ops)


def prepare_ops(ops: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """Compile ops in one process; those that are compiled already are only loaded.

    Args:
        ops: names of builders.
        environment: added to this process's own.
        log: where the compiler's words go.

    Raises:
        RunFailedError: if one does not compile, or waits on the lock that a killed compilation left.
    """
    seconds = COMPILE_SECONDS * len(ops)
    with log.open("ab") as file:
        try:
            result = subprocess.run(
                [sys.executable, "-c", _COMPILE, *ops],
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise RunFailedError(
                f"DeepSpeed's ops did not compile in {seconds:.0f} s: if nothing else is "
                f"compiling, remove the stale file named lock under {_extensions_folder()} (log: {log})"
            ) from None
    if result.returncode:
        raise RunFailedError(f"DeepSpeed's ops do not compile: {', '.join(ops)} (log: {log})")


def _extensions_folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
