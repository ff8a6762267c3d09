"""The section on a GPU shows a check's figures, says when there are none, and refuses a rehearsal.

`tests/data/gpu_rehearsal.json` is a rehearsal on a CPU; tests of a GPU's record change what it says about itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from translution.cli.main import run
from translution.planner.common.errors import InputError
from translution.reports.inputs.gpu_record import GPU_RECORD, GpuCheck, load_gpu_check
from translution.reports.render.document import Document, Table, load_document
from translution.reports.sections.gpu import NOT_MEASURED, gpu_section

Record = dict[str, Any]


@pytest.fixture
def rehearsal(root: Path) -> Record:
    record: Record = json.loads((root / "tests" / "data" / "gpu_rehearsal.json").read_text(encoding="utf-8"))
    assert (record["device"], record["small"]) == ("cpu", True)
    return record


@pytest.fixture
def as_if_on_a_gpu(rehearsal: Record, tmp_path: Path) -> Callable[[], Path]:
    """Writes the rehearsal into a folder as the record of a GPU; tests change it before."""
    rehearsal |= {"device": "cuda", "small": False, "card": {"name": "Test Card", "driver_version": "1.2"}}

    def write() -> Path:
        (tmp_path / GPU_RECORD).write_text(json.dumps(rehearsal), encoding="utf-8")
        return tmp_path

    return write


def loaded(folder: Path) -> GpuCheck:
    check = load_gpu_check(folder)
    assert check is not None
    return check


def table(check: GpuCheck, key: str) -> Table:
    (found,) = [part for part in gpu_section(check).parts if isinstance(part, Table) and part.key == key]
    return found


def data(record: Record, name: str) -> Record:
    (part,) = [part for part in record["parts"] if part["name"] == name]
    found: Record = part["data"]
    return found


def test_every_part_has_its_figures(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    check = loaded(as_if_on_a_gpu())
    assert "Test Card, driver 1.2" in gpu_section(check).text[0]
    rows = table(check, "gpu-parts").rows
    day = rehearsal["made"]["time_utc"][:10]
    assert [row[:4] for row in rows] == [
        (part["name"], day, part["state"], part["seconds"]) for part in rehearsal["parts"]
    ]
    ways = [way for row in data(rehearsal, "operators")["results"] for way in row["ways"]]
    assert [row[3:6] for row in table(check, "gpu-operators").rows] == [
        (way["forward_seconds"], way["backward_seconds"], way["peak_bytes"]) for way in ways
    ]
    steps = data(rehearsal, "memory")["overhead"]
    assert [row[:2] for row in table(check, "gpu-overhead").rows] == [(x["what"], x["device_bytes"]) for x in steps]
    (largest,) = data(rehearsal, "largest")["runs"]
    assert largest["samples_per_s"] in table(check, "gpu-largest").rows[0]
    rates = data(rehearsal, "transfers")["rates"]
    assert [row[:2] for row in table(check, "gpu-transfers").rows] == [
        (rate["what"], rate["per_second"] / 1e9) for rate in rates
    ]


def test_a_part_of_an_earlier_run_has_its_own_date(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    rehearsal["parts"][1]["made"] = rehearsal["made"] | {"time_utc": "2026-01-02T03:04:05+00:00"}
    assert table(loaded(as_if_on_a_gpu()), "gpu-parts").rows[1][1] == "2026-01-02"


def test_blocks_and_networks_are_shown(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    failed = {"operator": "alpha", "implementation": "auto", "error": "out of memory"}
    data(rehearsal, "operators")["networks"] = [
        {"operator": "translution", "implementation": "batched", "module": "block", "batch": 32, "seconds": 0.5}, failed
    ]  # fmt: skip
    assert table(loaded(as_if_on_a_gpu()), "gpu-networks").rows == (
        ("block", 32, "translution", "batched", 0.5, None),
        (None, None, "alpha", "auto", None, "out of memory"),
    )


def test_predictions_stand_next_to_what_was_measured(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    plan = data(rehearsal, "memory")["plans"][0]
    plan |= {"reserved_bytes": 3000, "predicted_reserved_bytes": 6000, "own_device_bytes": 8000}
    plan |= {"predicted_device_bytes": 4000, "allocated_bytes": 1000, "predicted_allocated_bytes": 1500}
    time = data(rehearsal, "times")["plans"][0]
    time |= {"catalog_s": [3.0, 2.0, 5.0], "calibrated_s": [2.0, 1.0, 4.0], "step_seconds": 1.0}
    time |= {"fastest_seconds": 0.9, "slowest_seconds": 1.2}
    check = loaded(as_if_on_a_gpu())
    assert table(check, "gpu-memory").rows[0] == (
        plan["name"], 1500, 1000, 1.5, 6000, 3000, 2.0, 4000, 8000, 0.5, None
    )  # fmt: skip
    assert table(check, "gpu-times").rows[0] == (
        time["name"], (3.0, 2.0, 5.0), 3.0, (2.0, 1.0, 4.0), 2.0, (1.0, 0.9, 1.2)
    )  # fmt: skip


def test_a_part_that_failed_has_a_row_and_what_it_found(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    memory = next(part for part in rehearsal["parts"] if part["name"] == "memory")
    memory |= {"state": "timed out", "output": ["the last line"], "data": {"overhead": memory["data"]["overhead"][:2]}}
    rehearsal["parts"] = [part for part in rehearsal["parts"] if part["name"] != "times"]
    section = gpu_section(loaded(as_if_on_a_gpu()))
    keys = [part.key for part in section.parts]
    assert "gpu-overhead" in keys and "gpu-memory" not in keys and "gpu-times" not in keys


def test_without_a_record_the_section_says_so(tmp_path: Path) -> None:
    assert load_gpu_check(tmp_path) is None
    section = gpu_section(None)
    assert section.text == (NOT_MEASURED,)
    assert section.text[0].startswith("Not yet measured on a GPU.")
    assert not section.parts


def test_a_rehearsal_is_not_shown_as_a_gpus(rehearsal: Record, tmp_path: Path) -> None:
    path = tmp_path / GPU_RECORD
    path.write_text(json.dumps(rehearsal))
    with pytest.raises(InputError, match="device: 'cpu' is not allowed: must be cuda: this is a rehearsal on a CPU"):
        load_gpu_check(tmp_path)
    path.write_text(json.dumps(rehearsal | {"device": "cuda"}))
    with pytest.raises(InputError, match="small: True is not allowed: must be False"):
        load_gpu_check(tmp_path)
    with pytest.raises(InputError, match=r"--gpu: '.*absent' is not allowed"):
        load_gpu_check(tmp_path / "absent")


def test_an_unknown_finding_is_named(rehearsal: Record, as_if_on_a_gpu: Callable[[], Path]) -> None:
    data(rehearsal, "transfers")["rate"] = 1
    with pytest.raises(InputError, match=r"gpu_check.json: transfers: .*rate"):
        gpu_section(loaded(as_if_on_a_gpu()))


@pytest.mark.slow
def test_the_report_has_the_section(
    as_if_on_a_gpu: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    documents: list[Document] = []
    for folder in (empty, as_if_on_a_gpu()):
        names = [str(tmp_path / name) for name in ("page.html", "page.json")]
        assert run(["report", "--gpu", str(folder), "--out", names[0], "--data", names[1], "--force"]) == 0
        documents.append(load_document(Path(names[1])))
        assert ("Not yet measured on a GPU" in Path(names[0]).read_text(encoding="utf-8")) == (folder == empty)
    assert [section.key for document in documents for section in document.sections] == ["gpu-section"] * 2
    assert documents[1].tables
    capsys.readouterr()


def test_the_gallery_includes_the_section(root: Path) -> None:
    assert "--gpu reports/gpu " in (root / "Makefile").read_text(encoding="utf-8")
    load_gpu_check(root / "reports" / "gpu")  # An error if a rehearsal is committed there.
