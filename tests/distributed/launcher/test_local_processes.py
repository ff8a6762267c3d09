"""What the launcher reads while its ranks run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from translution.distributed.launcher.local_processes import MetricsReader


def test_a_damaged_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    path, seen = tmp_path / "metrics.jsonl", list[Mapping[str, Any]]()
    reader = MetricsReader(path, seen.append)
    reader.poll()
    path.write_bytes(
        b'{"event": "step", "step": 1}\n{"step": 7}\n{"st\n\x00\x00\n'
        + 100_000 * b"["
        + b'\n{"event": "step", "step": 2}\n'
    )
    with path.open("ab") as file:
        file.write(b'{"event": "step", "step": 3')
    reader.poll()
    assert [line["step"] for line in seen] == [1, 2]
    with path.open("ab") as file:
        file.write(b"}\n")
    reader.poll()
    assert seen[-1] == {"event": "step", "step": 3}
