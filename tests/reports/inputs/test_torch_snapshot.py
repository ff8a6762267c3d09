"""Memory snapshots of torch: as it writes them, as JSON, and hostile ones, which are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from translution.cli.main import run
from translution.planner.common.errors import InputError
from translution.planner.common.units import GIB, MIB
from translution.planner.config.loading import preset
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.reports.inputs.torch_snapshot import BEFORE, UNKNOWN, read_snapshot
from translution.reports.render.document import load_document

Captured = pytest.CaptureFixture[str]
TORCH = {"filename": "/env/torch/nn/functional.py", "line": 3, "name": "linear"}


def entry(action: str, addr: int, size: int, name: str = "") -> dict[str, Any]:
    frames = [TORCH, {"filename": "/x/models/grouped.py", "line": 1, "name": name}] if name else []
    fixed = {"stream": 0, "time_us": 0, "compile_context": "N/A", "user_metadata": "", "pool_id": (0, 0)}
    return {"action": action, "addr": addr, "size": size, "frames": frames} | fixed


def snapshot() -> dict[str, Any]:
    """Return the snapshot of a GPU with 3 GiB that stay, 1 GiB that is freed, and 2 GiB for a while."""
    trace = [
        entry("segment_alloc", 0, 4 * GIB),
        entry("alloc", 10, GIB, "forward"),
        entry("alloc", 11, GIB),
        entry("free_requested", 5, GIB, "earlier"),
        entry("free_completed", 5, GIB, "earlier"),
        entry("free_requested", 10, GIB, "forward"),
        entry("free_completed", 10, GIB, "forward"),
        {"action": "oom", "size": 99 * GIB, "device_free": MIB, "frames": [], "stream": 0},
        entry("snapshot", 0, 0),
    ]
    blocks = [
        {"address": 11, "size": GIB + 512, "requested_size": GIB, "state": "active_allocated", "frames": []},
        {"address": 12, "size": 3 * GIB, "requested_size": 3 * GIB, "state": "active_allocated", "frames": []},
        {"address": 13, "size": GIB, "requested_size": 0, "state": "inactive", "frames": []},
        {"address": 14, "size": GIB, "requested_size": GIB, "state": "active_awaiting_free", "frames": []},
    ]
    segment = {"device": 1, "address": 0, "total_size": 6 * GIB, "segment_pool_id": (0, 0), "blocks": blocks}
    other = segment | {"device": 0}
    return {"segments": [segment, other], "device_traces": [[], trace], "allocator_settings": {}, "new_in_torch": None}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_snapshot_is_read_as_torch_writes_it(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot(), protocol=protocol))
    found = read_snapshot(path)
    assert found.device == 1
    # 4 GiB are live at the start, 3 of them to the end; the peak is before the first release.
    assert (found.start_bytes, found.timeline.peak_bytes, found.end_bytes) == (4 * GIB, 6 * GIB, 4 * GIB)
    peak = dict(zip(found.timeline.categories, found.timeline.peak.live_bytes, strict=True))
    assert peak == {BEFORE: 4 * GIB, "grouped.py: forward": GIB, UNKNOWN: GIB}
    assert found.reserved_bytes == 6 * GIB
    assert found.failed_bytes == 99 * GIB


def test_json_gives_the_same(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(snapshot()))
    (tmp_path / "s.pickle").write_bytes(pickle.dumps(snapshot()))
    assert read_snapshot(tmp_path / "s.json") == read_snapshot(tmp_path / "s.pickle")


class Calls:
    """Runs a command when Python's unpickler loads it."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.parts


def nested(levels: int) -> tuple[Any, ...]:
    """Return a tuple whose hash takes 2 ** levels steps."""
    value: tuple[Any, ...] = (1, 2)
    for _ in range(levels):
        value = (value, value)
    return value


EMPTY: dict[str, Any] = {"segments": [], "device_traces": [[]]}
HOSTILE: list[tuple[str, bytes, str]] = [
    ("calls", pickle.dumps(Calls(os.system, "touch MARK")), "STACK_GLOBAL is not allowed"),
    ("calls, old", pickle.dumps(Calls(subprocess.getoutput, "touch MARK"), protocol=2), "GLOBAL is not allowed"),
    ("deep inside", pickle.dumps(snapshot() | {"x": [Calls(eval, "1")]}), "STACK_GLOBAL is not allowed"),
    ("extension", b"\x80\x02\x82\x01.", "EXT1 is not allowed"),
    ("persistent", b"\x80\x02K\x01Q.", "BINPERSID is not allowed"),
    # {((...), (...)): 1}: the dict's key would be hashed.
    ("hash", b"\x80\x04}" + pickle.dumps(nested(60))[11:-1] + b"K\x01s.", "keys must be texts"),
    ("endless memo", b"\x80\x02]r\xff\xff\xff\xff.", "must be a dict"),
    ("long text", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "is not a memory snapshot"),
    ("cut off", pickle.dumps(snapshot())[:-40], "is not a memory snapshot"),
    ("no stack", b"\x80\x02s.", "is not a memory snapshot"),
    ("itself", b"\x80\x04]\x94h\x00a.", "must be a dict"),
    ("binary", b"\xff\xfe\x00", "neither a pickle nor JSON"),
    ("text", b"snapshot", "not valid JSON"),
    ("number", b"7", "must be a dict"),
    ("no traces", b"{}", "device_traces: must be a list with a list for each GPU"),
    ("trace of numbers", b'{"segments": [], "device_traces": [[1, 2]]}', "device_traces.0.0: "),
    ("negative", b'{"segments": [], "device_traces": [[{"action": "alloc", "size": -1}]]}', "device_traces.0.0.size: "),
    ("nothing recorded", pickle.dumps(EMPTY), "holds no allocation"),
    ("no segments", pickle.dumps({"device_traces": [[entry("alloc", 1, 1)]]}), "segments: must be a list"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_file_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_snapshot(path)
    text = str(caught.value)
    assert not Path("MARK").exists()
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_shared_lists_do_not_multiply(tmp_path: Path) -> None:
    blocks = [{"size": 1, "state": "inactive"}] * 3000
    shared = {"segments": [{"total_size": 1, "blocks": blocks}] * 1000, "device_traces": [[entry("alloc", 1, 1)]]}
    (tmp_path / "x").write_bytes(pickle.dumps(shared))
    with pytest.raises(InputError, match="segments: 3,000,000 entries are not allowed"):
        read_snapshot(tmp_path / "x")


@pytest.mark.ranks
def test_report_lays_the_snapshot_over_the_prediction(tmp_path: Path, capsys: Captured) -> None:
    training = TrainingSpec(precision="bf16", data="synthetic", steps=4)
    plan = make_plan(preset("vit-tiny/56"), load_cluster("1xH100"), training)
    write_plan_folder(plan, tmp_path / "plan")
    recorded = snapshot()
    recorded["device_traces"][1][1]["frames"][1]["name"] = "<script>alert(1)</script>"
    (tmp_path / "s.pickle").write_bytes(pickle.dumps(recorded))
    files = ["--out", str(tmp_path / "x.html"), "--data", str(tmp_path / "x.json")]
    asked = ["report", str(tmp_path / "plan"), "--snapshot", str(tmp_path / "s.pickle")]
    assert run([*asked, "--snapshot-steps", "2", *files]) == 0
    document = load_document(tmp_path / "x.json")
    (table,) = [table for table in document.tables if table.key == "snapshot-table"]
    rows = {row[0]: row[1:3] for row in table.rows}
    predicted = max(plan.prediction.allocated_bytes_of(phase) for phase in ("forward", "backward", "optimizer step"))
    assert rows["allocated, highest"] == (predicted, 6 * GIB)
    assert rows["reserved by torch"][1] == 6 * GIB
    (picture,) = [picture for picture in document.pictures if picture.key == "snapshot"]
    lines = [values for values in picture.spec["datasets"].values() if set(values[0]) == {"x", "y"}]
    (line,) = [values for values in lines if len(values) > 2]
    # Two equal steps. Their highest point may be another one than that where the whole device's memory is highest.
    half = len(line) // 2
    assert [row["y"] for row in line[:half]] == [row["y"] for row in line[half:-1]]
    assert predicted <= round(max(row["y"] for row in line) * GIB) <= 1.01 * predicted
    assert "<script>alert(1)" not in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert document.made.command.endswith(" ".join(["--snapshot-steps", "2", *files]))
    capsys.readouterr()
    for words, message in (
        (["--snapshot-steps", "0"], "--snapshot-steps: 0 is not allowed: must be between 1 and 100"),
        ([str(tmp_path / "plan")], "--snapshot: is not allowed with 2 plans: must be exactly one"),
    ):
        assert run([*asked, *words, "--out", str(tmp_path / "y.html")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "y.html").exists()
