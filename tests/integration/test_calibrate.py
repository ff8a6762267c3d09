"""`calibrate` measures this machine and writes a cluster file that plans use."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from helpers.runs import has_libaio

from translution.cli.main import run
from translution.distributed.calibration import run as calibrating
from translution.distributed.calibration.run import calibrate, machine_file
from translution.planner.common.errors import InputError, RunFailedError
from translution.planner.hardware.cluster import MatmulRate, MeasuredRates, Transfer, load_cluster, local_cpu_cluster
from translution.planner.timing.rates import Rates


def test_a_machine_is_measured_and_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All measurements, at a few small sizes; make bigger-than-memory measures at full size."""
    monkeypatch.setattr(calibrating, "calibrate", functools.partial(calibrate, quick=True))
    out = tmp_path / "machine.yaml"
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    arguments = ["calibrate", "--cluster", "cpu:1", "--out", str(out), "--json"]
    if has_libaio():
        arguments += ["--nvme-path", str(nvme)]
    assert run(arguments) == 0
    captured = capsys.readouterr()
    measured = json.loads(captured.out)["measured"]
    assert {point["precision"] for point in measured["matmul"]} == {"fp32", "bf16"}
    assert measured["ranks"] == 1
    assert "torch" in measured["machine"]
    cluster = load_cluster(str(out))
    assert cluster.measured == MeasuredRates.model_validate(measured)
    assert list(nvme.iterdir()) == []
    if "--nvme-path" in arguments:
        assert cluster.nvme_bytes
        assert cluster.measured.nvme_read_bytes_per_s
    rates = Rates(cluster, "fp32")
    fastest = max(point["flops_per_s"] for point in measured["matmul"] if point["precision"] == "fp32")
    assert rates.peak_flops_per_s == fastest
    assert rates.host_adam_elements_per_s > 1e6
    plan = ["plan", "vit-tiny/56", "--cluster", str(out), "--data", "synthetic", "--out", str(tmp_path / "plan")]
    assert run([*plan, "--stage", "3", "--offload", "none", "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["plan"]["time"]
    assert 0 < time["low_s"] < time["likely_s"] < time["high_s"]


def test_only_this_machine_can_be_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nodes: 2 is not allowed"):
        calibrate(load_cluster("2x8xH100"), None, "", print)
    with pytest.raises(InputError, match="nvme_path"):
        calibrate(local_cpu_cluster(1), str(tmp_path / "absent"), "", print)


def test_a_failed_rank_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "prepare_ops", lambda *_: None)
    monkeypatch.setattr(calibrating.sys, "executable", "/bin/false")
    with pytest.raises(RunFailedError, match="a rank failed"):
        calibrate(local_cpu_cluster(1), None, "", lambda _: None)


def test_rates_are_medians_over_the_ranks(tmp_path: Path) -> None:
    def rates(value: float) -> MeasuredRates:
        points = (MatmulRate(precision="fp32", rows=8, width=64, flops_per_s=value),)
        transfer = Transfer(latency_s=value, bytes_per_s=value)
        return MeasuredRates(ranks=3, matmul=points, all_gather=transfer, memory_bytes_per_s=value)

    middle = calibrating._median([rates(5.0), rates(1.0), rates(3.0)])
    assert middle == rates(3.0)
    path = tmp_path / "machine.yaml"
    path.write_text(machine_file("cpu:1", middle, None))
    assert load_cluster(str(path)).measured == middle
