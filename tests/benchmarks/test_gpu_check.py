"""`scripts/gpu_check.py`: parts that fail or outlast their limit are reported and stop nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import PATIENCE_S, wait_until

from translution.planner.common.units import MIB

WRITE = "import json, pathlib; pathlib.Path({path!r}).write_text(json.dumps({document!r}))"


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """The package of the parts, found as the script finds it."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    sys.path.append(folder)
    import gpu_parts.largest
    import gpu_parts.machine
    import gpu_parts.main
    import gpu_parts.results
    import gpu_parts.runner

    yield gpu_parts
    sys.path.remove(folder)


def document(line: str, **data: Any) -> dict[str, Any]:
    return {"name": "x", "state": "running", "line": line, "data": data}


def program(*statements: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "\n".join(statements))


def processes_of(marker: str) -> list[int]:
    """Running processes whose command line has the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words, state = path.read_bytes(), (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marker.encode() in words and state != "Z" and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_parts_that_fail_or_outlast_their_limit_stop_no_other(parts: Any, tmp_path: Path) -> None:
    marker = f"left-behind-{os.getpid()}"
    out, lines = tmp_path / "out", []
    out.mkdir()
    (out / "late.json").write_text("of an earlier run")
    late = (
        WRITE.format(path=str(out / "late.json"), document=document("one row", rows=[1])),
        f"pathlib.Path({str(out / '.late.json.1.tmp')!r}).write_text('half')",
        "import subprocess, sys, time",
        # One in the part's group that ignores the request to end, and one that has left the group.
        "ignore = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'",
        f"subprocess.Popen([sys.executable, '-c', ignore, {marker!r}])",
        f"subprocess.Popen([sys.executable, '-c', ignore, {marker!r}], start_new_session=True)",
        "print('row 1', flush=True)",
        "time.sleep(600)",
    )
    make = parts.runner.Part
    chosen = [
        make("background", 60, program("print(1)"), background=True),
        make("failing", 4, program("print('before')", "raise ValueError('broken on purpose')")),
        make("late", 3, program(*late)),
        make("forked", 60, work=lambda seconds: parts.results.Result(out / "forked.json", "f").say("f")),
        make("good", 60, program(WRITE.format(path=str(out / "good.json"), document=document("3 rows")))),
    ]
    runner = parts.runner.Runner(out, {"device": "cpu"}, 100.0, {}, lines.append)
    assert not runner.run(chosen)
    summary = read(out / "gpu_check.json")
    states = {part["name"]: part["state"] for part in summary["parts"]}
    assert states == {"background": "ok", "failing": "failed", "late": "timed out", "forked": "ok", "good": "ok"}
    found = {part["name"]: part for part in summary["parts"]}
    assert found["failing"]["output"][-1] == "ValueError: broken on purpose"
    assert found["late"]["data"] == {"rows": [1]}
    assert found["late"]["output"] == ["row 1"]
    assert (found["good"]["line"], found["forked"]["line"]) == ("3 rows", "f")
    assert processes_of(marker) == []
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["gpu_check.json", "failing.json", "late.json", "background.json", "forked.json", "good.json"]
    )
    for name in states:
        assert read(out / f"{name}.json") == found[name]
    assert sorted(line.partition(":")[0] for line in lines) == sorted(states)
    assert any("failed (ValueError: broken on purpose)" in line for line in lines)


def test_no_part_begins_when_the_time_is_over(parts: Any, tmp_path: Path) -> None:
    chosen = [parts.runner.Part(name, 60, program("pass")) for name in ("first", "second")]
    assert not parts.runner.Runner(tmp_path, {}, parts.runner.GRACE_SECONDS + 1.0, {}, print).run(chosen)
    assert [part["state"] for part in read(tmp_path / "gpu_check.json")["parts"]] == ["not run", "not run"]


def test_a_signal_ends_the_part_and_writes_the_summary(root: Path, tmp_path: Path) -> None:
    marker = f"signal-{os.getpid()}"
    code = (
        f"import sys, signal; sys.path.append({str(root / 'benchmarks')!r})\n"
        "from pathlib import Path\nfrom gpu_parts.main import _raise_exit\nfrom gpu_parts.runner import Part, Runner\n"
        "signal.signal(signal.SIGTERM, _raise_exit)\n"
        f"sleep = (sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)', {marker!r})\n"
        f"Runner(Path({str(tmp_path)!r}), {{}}, 600.0, {{}}).run([Part('long', 500, sleep)])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        # The child has the runner's command line until it has loaded its program.
        wait_until(
            lambda: any(
                pid != process.pid and command_of(pid) not in (b"", command_of(process.pid))
                for pid in processes_of(marker)
            )
        )
        process.terminate()
        printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + 15
    assert "long:" in printed
    assert processes_of(marker) == []
    assert [part["state"] for part in read(tmp_path / "gpu_check.json")["parts"]] == ["stopped"]


def test_limits_fit_the_minutes(parts: Any) -> None:
    limits = [limit for name, (limit, _) in parts.main.PARTS.items() if name != parts.main.BACKGROUND]
    assert sum(limits) + parts.runner.GRACE_SECONDS <= parts.main.MINUTES * 60
    assert len(parts.main.PARTS) + 1 <= 8


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--parts", "parity,memori"], "--parts: 'memori' is not allowed: must be of ops, parity,"),
        (["--parts", ","], "--parts: is empty"),
        (["--minutes", "0"], "--minutes: 0.0 is not allowed: must be above 0"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(
    words: list[str], text: str, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        parts.main.main(["--device", "cpu", "--out", str(out), *words])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "mib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX4090"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA H1000", 81559, None),
    ],
)
def test_a_card_is_found_in_the_catalog(name: str, mib: int, expected: str | None, parts: Any) -> None:
    assert parts.machine.gpu_in_catalog(name, mib * MIB) == expected


def test_this_machines_cluster_has_its_card_and_its_host(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"name": "NVIDIA H100 80GB HBM3", "memory.total": "81000"}
    monkeypatch.setattr(parts.machine, "card", lambda: found)
    cluster = parts.machine.this_machine("cuda")
    assert (cluster.gpu, cluster.world_size, cluster.device_memory_bytes) == ("H100", 1, 81000 * MIB)
    assert cluster.host_memory_bytes < 2**50
    assert cluster.bf16_flops_per_s
    found["name"] = "NVIDIA Unheard-of"
    assert parts.machine.this_machine("cuda").gpu is None


def test_figures_without_a_form_in_json_become_null(parts: Any) -> None:
    assert parts.results.finite({"a": [float("nan"), (1.0, float("inf"))], 2: "x"}) == {
        "a": [None, [1.0, None]],
        "2": "x",
    }


def test_the_configurations_that_were_timed_are_recorded(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_profile
    import torch

    from translution.models.ops.fused import configs

    offered = configs.CANDIDATES["logits_kernel"][:2]
    seconds = dict(zip(offered, (0.25, float("inf")), strict=True))
    for name, value in (("_timed", []), ("_chosen", {})):
        monkeypatch.setattr(configs, name, value)
    monkeypatch.setattr(configs, "_compile_together", lambda configurations, launch: None)
    monkeypatch.setattr(configs, "_seconds", lambda launch, config: seconds[config])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    key = ("logits_kernel", (("ADD", True),), (torch.bfloat16,), torch.device("cpu"), (768, 768, 12), 3)
    configs.choose_config(key, offered, lambda config, **_: None, timed=True)
    rows = kernel_profile.tuning_rows()
    assert [(row["rows"], row["columns"], row["registers"], row["seconds"]) for row in rows] == [
        (offered[0].rows, offered[0].columns, offered[0].registers, 0.25),
        (offered[1].rows, offered[1].columns, offered[1].registers, None),
    ]
    first = {"kernel": "logits_kernel", "constants": "ADD=True", "widths": [768, 768, 12], "size_class": 3}
    assert rows[0].items() >= first.items()


def test_a_later_run_keeps_the_other_parts_of_the_same_card(parts: Any, tmp_path: Path) -> None:
    def run(names: tuple[str, ...], card: str, date: str) -> dict[str, Any]:
        about = {"device": "cuda", "small": False, "card": {"name": card}, "made": {"time_utc": date}}
        found = [parts.runner.Part(name, 20.0, program("pass")) for name in names]
        assert parts.runner.Runner(tmp_path, about, 60.0, {}, lambda line: None).run(found)
        summary: dict[str, Any] = json.loads((tmp_path / parts.runner.SUMMARY).read_text())
        return {part["name"]: part["made"]["time_utc"] for part in summary["parts"]}

    assert run(("a", "b"), "one", "monday") == {"a": "monday", "b": "monday"}
    assert run(("b",), "one", "tuesday") == {"a": "monday", "b": "tuesday"}
    assert run(("b",), "two", "friday") == {"b": "friday"}
