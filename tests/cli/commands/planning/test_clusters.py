"""`translution clusters`: GPUs, nodes and the source of every figure."""

from __future__ import annotations

import json

import pytest

from translution.cli.main import run

Captured = pytest.CaptureFixture[str]


def test_clusters_are_listed_with_their_sources(capsys: Captured) -> None:
    assert run(["clusters"]) == 0
    out = capsys.readouterr().out
    for text in ("RTX4090", "dgx-h100", "nd-mi300x-v5", "nvidia-tensor-core-gpu-datasheet", "estimate, not measured"):
        assert text in out
    assert run(["clusters", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figure = document["gpus"]["H100"]["memory_bytes_per_s"]
    assert (figure["value"], document["sources"][figure["source"]]["title"][:11]) == (3.35e12, "NVIDIA H100")
    assert document["nodes"]["dgx-h100"]["host_cores"] == {"value": 112, "source": "dgx-h100"}
    assert document["gpu_constants"]["H100"]["entries"][0]["name"] == "driver_reserve"
