"""Compiles DeepSpeed's ops in the background, each with its time; other parts wait for the op that they load."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from translution.distributed.system import prepare_ops
from translution.planner.common import TranslutionError

from .machine import Context

OPS = {
    "cuda": ("FusedAdamBuilder", "CPUAdamBuilder", "AsyncIOBuilder"),
    "cpu": ("ShareMemCommBuilder", "CPUAdamBuilder"),
}
NEEDED = ("ShareMemCommBuilder", "CPUAdamBuilder")
"""Without the others, only some of the transfers are not measured."""
_LOG_LINES = 12


def compile_ops(context: Context) -> None:
    """Compile the ops one after the other, the one that plans need first.

    Raises:
        SystemExit: if one that plans need does not compile.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="translution-ops-") as folder:
        for name in OPS[context.device]:
            log = Path(folder) / f"{name}.log"
            log.touch()
            began, error = time.monotonic(), ""
            try:
                prepare_ops((name,), {}, log)
            except TranslutionError as problem:
                error = str(problem).partition(" (log:")[0]
                failed.append(name)
            seconds = time.monotonic() - began
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if error else []
            row = {"op": name, "seconds": seconds, "error": error, "log": [x[:300] for x in lines[-_LOG_LINES:]]}
            context.result.add("ops", row)
            done = [f"{row['op'].removesuffix('Builder')} {row['seconds']:.0f} s{' failed' if row['error'] else ''}"
                    for row in context.result.data["ops"]]  # fmt: skip
            context.result.say(", ".join(done))
    if missing := [name for name in failed if name in NEEDED]:
        raise SystemExit(f"{', '.join(missing)}: does not compile")


def is_compiled(out_data: dict[str, object], name: str) -> bool:
    """True if the background part has compiled an op.

    Args:
        out_data: findings of `compile_ops`.
        name: name of the op's builder.
    """
    rows = out_data.get("ops", [])
    return isinstance(rows, list) and any(row["op"] == name and not row["error"] for row in rows)
