"""The pages of docs whose scripts run on several ranks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.doc_pages import ROOT, Shown, commands, fences, programs
from helpers.runs import run_ranks_of
from sklearn.datasets import load_digits

from translution.cli.main import run
from translution.distributed.system.environment import free_port, launch_environment
from translution.planner.hardware.cluster import local_cpu_cluster


def follow(page: str, folder: Path) -> Shown:
    """Write a page's files, run its commands but for the last one, and return that."""
    path = ROOT / "docs" / f"{page}.md"
    for fence in fences(path.read_text(encoding="utf-8")):
        if fence.language == "yaml":
            (folder / fence.lines[0].removeprefix("# ")).write_text("\n".join(fence.lines))
    script = programs(path)[-1]
    # Otherwise gloo's threads may free a tensor while Python ends, and the rank aborts after its work.
    assert "leave_process_group()" in script.lines[-1] or "destroy_process_group()" in script.lines[-1]
    (folder / script.lines[0].removeprefix("# ")).write_text("\n".join(script.lines))
    *before, last = commands(path)
    assert all(run(shown.words[1:]) == 0 for shown in before)
    return last


@pytest.mark.slow
@pytest.mark.parametrize("page", ["integrations/ddp", "integrations/huggingface", "relation-parallel"])
def test_the_script_of_a_page_runs_on_two_ranks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = follow(page, tmp_path)
    assert typed.words == ["torchrun", "--nproc_per_node", "2", "train.py"]
    run_ranks_of(["train.py"], 2, tmp_path / "log")
    if page.endswith("huggingface"):
        # Not above: this takes seconds, and every worker of pytest-xdist imports this file.
        from transformers import AutoModelForImageClassification

        import translution.models.integrations.huggingface

        assert translution.models.integrations.huggingface
        model = AutoModelForImageClassification.from_pretrained("trained").eval()
        digits = load_digits()
        images = torch.tensor(digits.images[:320], dtype=torch.float32)[:, None] / 16
        torch.manual_seed(0)
        untrained = AutoModelForImageClassification.from_config(model.config).eval()
        with torch.no_grad():
            labels = torch.tensor(digits.target[:320])
            before, after = (one(images, labels=labels).loss.item() for one in (untrained, model))
        assert before > 0.9 * math.log(10)
        # Found: 2.43 and 1.76.
        assert after < 0.85 * before


@pytest.mark.slow
def test_accelerate_launches_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = follow("integrations/accelerate", tmp_path)
    assert typed.words[:2] == ["accelerate", "launch"]
    # The command of that name imports timm, which needs torchvision.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    done = subprocess.run(
        [*command, *typed.words[2:]],
        cwd=tmp_path / "plans" / "small",
        env=os.environ | launch_environment(local_cpu_cluster(2)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "2 ranks, DistributedType.DEEPSPEED, loss " in done.stdout
