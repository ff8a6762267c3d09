"""Run every command and every Python block of the README and of docs, in the order of the page.

Training commands run in this process if a page shows their output (docs/commands.md). On other pages that run stands in
for theirs, and the table below names the test that runs the same command; so it does for commands that need other hosts
or Slurm.
"""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from helpers.data.imagenet import write_archives
from helpers.doc_pages import (
    ROOT,
    Shown,
    commands,
    fences,
    first_difference,
    programs,
    reader_pages,
    source_with_helpers,
)
from helpers.packages.timm import load_timm
from helpers.runs import run_ranks_of

from translution.cli.main import run
from translution.distributed import leave_process_group
from translution.distributed.calibration import run as calibrate
from translution.distributed.experiments import runner as experiment
from translution.models import build, to_published
from translution.planner.common.machine import usable_cores
from translution.planner.config.loading import load_model
from translution.planner.hardware.cluster import MatmulRate, MeasuredRates, Transfer

Captured = pytest.CaptureFixture[str]
LIVE = "docs/commands.md"
needs_two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")

RANKS, HOSTS, SERVER = "integration", "integration/test_hosts.py", "reports/calculator/test_server.py"
ELSEWHERE = {
    "launch": f"{RANKS}/test_runs.py::test_the_command_line_runs_a_plan_and_verifies_it",
    "launch --from": "distributed/checkpoint/test_weights.py::test_a_run_starts_from_a_network_file",
    # With changed files in test_offload.py.
    "launch --check-swap": (
        "cli/commands/training/test_launch.py::test_the_choice_to_check_swap_files_reaches_the_ranks_wherever_they_run"
    ),
    "launch --resume": f"{RANKS}/test_reshard.py::test_a_run_resumes_on_fewer_ranks_then_on_more_with_other_offload",
    "launch --hostfile": f"{HOSTS}::test_a_launch_trains_on_two_hosts_is_stopped_and_resumes",
    "launch --hostfile --resume": f"{HOSTS}::test_a_launch_trains_on_two_hosts_is_stopped_and_resumes",
    "launch --hostfile --no-ssh --node-rank --run": f"{HOSTS}::test_every_node_starts_its_own_ranks_without_ssh",
    "preflight --hostfile": f"{HOSTS}::test_preflight_checks_every_host",
    "measure --cluster --micro-batch --precision": "docs/test_pages.py::test_the_commands_of_a_page_work",
    "compare --gpu --out": "docs/test_pages.py::test_the_commands_of_a_page_work",
    "rehearse --layers --rank": f"{RANKS}/test_rehearse.py::test_a_rank_of_a_larger_world_holds_what_is_predicted",
    "calibrate --cluster --out": f"{RANKS}/test_calibrate.py::test_a_machine_is_measured_and_planned_for",
    "experiment": "distributed/experiments/test_runner.py::test_a_quick_experiment_writes_figures_table_and_picture",
    "report --cluster --model --out": "conftest.py::gallery_folder",
    "report --cluster --out --scaling": "conftest.py::gallery_folder",
    "report --out --snapshot --snapshot-steps": (
        "reports/inputs/test_torch_snapshot.py::test_report_lays_the_snapshot_over_the_prediction"
    ),
    "serve": f"{SERVER}::test_costs_are_immediate_and_the_plan_follows",
    "serve --port": f"{SERVER}::test_changing_the_form_updates_plan_and_url",
    "serve --open --port": f"{SERVER}::test_open_shows_the_page_in_the_default_browser",
    "serve --host --workers": f"{SERVER}::test_public_server_warns_and_its_workers_end_with_it",
    "sh plans/fsdp2/launch-torchrun.sh": (
        "distributed/fsdp2/test_sharding.py::test_a_plan_folder_trains_through_torchrun_and_resumes"
    ),
    "sbatch job.sbatch": f"{RANKS}/test_slurm.py::test_a_job_saves_before_its_limit_and_resumes_when_submitted_again",
    "python benchmarks/accuracy.py": "docs/test_pages.py::test_the_comparison_of_memory_is_made",
    "python scripts/gpu_check.py": f"{RANKS}/test_gpu_check.py::test_a_rehearsal_runs_every_part",
    "torchrun --nproc_per_node": "docs/test_integrations.py::test_the_script_of_a_page_runs_on_two_ranks",
    "accelerate launch": "docs/test_integrations.py::test_accelerate_launches_a_plan",
    "make demo": "docs/test_pages.py::test_the_demo_is_made_of_commands_that_are_tested",
    "make test": ".ci/run",
    "make bigger-than-memory": f"{RANKS}/test_accuracy.py::test_a_process_holds_what_is_predicted",
    "make offline-bundle": "scripts/conftest.py::made_bundle",
    "sh offline/install_offline.sh": (
        "scripts/test_install_offline.py::test_the_packages_are_installed_and_what_is_missing_is_named"
    ),
}
"""By `Shown.kind`: what is not run with its page, and the test that runs it, as a path in tests/."""
SHAPED = (
    "launch",
    "status",
    "verify",
    "preflight",
    "measure",
    "rehearse",
    "calibrate",
    "experiment",
    "export",
    "report",
)
"""Commands whose figures depend on the machine or the run: their output is compared without its figures."""
PREPARED = {
    "docs/clusters.md": [
        "plan vit-large/16 --cluster 8x8xH100 --precision bf16 --data synthetic --stage 3 --offload none "
        "--micro-batch 8 --out plans/large"
    ],
    "docs/reports.md": ["plan examples/digits.yaml --cluster cpu:2 --out plans/small"],
}
"""Commands to run before a page, which needs their files."""


class SerialExecutor:
    """Runs an experiment's trials one after the other in this process; a new process imports torch for 5 seconds."""

    def __init__(self, **_: object) -> None:
        pass

    def __enter__(self) -> SerialExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, **_: object) -> None:
        pass

    def submit(self, function: Any, *arguments: object) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


def write_rates(_: object, nvme_path: str | None, folder: Path, __: object) -> None:
    """Write rates as two ranks of `calibrate` do."""
    transfer = Transfer(latency_s=1e-4, bytes_per_s=1e9)
    rates = MeasuredRates(
        machine="", command="", time_utc="", ranks=2,
        matmul=tuple(MatmulRate(precision=precision, rows=rows, width=64, flops_per_s=rows * 1e8)
                     for precision in ("fp32", "bf16") for rows in (1, 64)),
        memory_bytes_per_s=1e10, norm_elements_per_s=1e9, operation_s=1e-5, all_gather=transfer,
        reduce_scatter=transfer, all_reduce=transfer, host_adam_elements_per_s=1e8,
        device_adam_elements_per_s=1e8, module_s=1e-3, gradient_s=1e-3, sub_group_s=1e-3,
    )  # fmt: skip
    for rank in (0, 1):
        (folder / f"rates_{rank}.json").write_text(rates.model_dump_json())


def copy_trained(places: Sequence[Path]) -> None:
    for place in places:
        shutil.copytree(_trained[0], place)


def prepare(folder: Path, page: str) -> None:
    """Make the files that a page names."""
    for name in ("examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    if page == "docs/published.md":
        spec = load_model("vit-tiny/56", image=32, patch=16, classes=10, depth=1, operator="alpha", c1=4, c2=4)
        state = to_published(build(spec), spec)
        torch.save({"arch": "lor_qkv_tiny", "state_dict": state}, folder / "checkpoint.pth")
    for name in ("book.txt", "more.txt"):
        (folder / name).write_text("a line of a book\n" * 200)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a line of a book"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    if page == "docs/data.md":
        tokenizer.add_special_tokens(["<|endoftext|>"])
        (folder / "gpt2").mkdir()
        tokenizer.save(str(folder / "gpt2" / "tokenizer.json"))
        (folder / "pages.jsonl").write_text('{"text": "a page of the web"}\n' * 20_000)
        write_archives(folder)
    for fence in fences((ROOT / page).read_text(encoding="utf-8")):
        named = re.fullmatch(r"# ([\w.-]+\.ya?ml)", fence.lines[0]) if fence.language == "yaml" else None
        if named:
            (folder / named[1]).write_text("\n".join(fence.lines) + "\n")
    for line in PREPARED.get(page, []):
        assert run(line.split()) == 0
        plan = folder / line.split()[-1]
        if (plan / "hostfile").exists():
            shutil.copy(plan / "hostfile", folder / "hosts")
        if _trained:
            copy_trained([plan / "runs" / "001", plan / "runs" / "002", folder / "runs" / "slurm-123"])


class Reader:
    """Runs the commands of a page in an empty folder."""

    def __init__(self, page: str, folder: Path, capsys: Captured, trained: Path | None) -> None:
        self.page, self.folder, self.capsys, self.trained = page, folder, capsys, trained
        self.last = ""

    def follow(self, shown: Shown) -> None:
        """Run a command or its stand-in, and compare its output with the page."""
        words = shown.words
        if words[0] == "cat":
            self.last = (self.folder / words[1]).read_text()
        elif words[0] != "translution" or (shown.kind in ELSEWHERE and (self.page != LIVE or words[1] == "serve")):
            assert shown.kind in ELSEWHERE, f"{shown}: nothing runs it"
            self._stand_in(shown)
            return
        else:
            self._type(shown)
        if shown.output is not None:
            shaped = words[1] in SHAPED or "cpu:" in shown.text
            difference = first_difference(shown.output, self.last, only_shape=shaped)
            assert difference is None, f"{shown}: {difference}"

    def _type(self, shown: Shown) -> None:
        expected = re.search(r"# exit code (\d)", shown.text)
        self.capsys.readouterr()
        code = run(shown.words[1:])
        printed = self.capsys.readouterr()
        assert code == (int(expected[1]) if expected else 0), f"{shown}: {printed.err}"
        self.last = printed.out + (printed.err if code else "")

    def _stand_in(self, shown: Shown) -> None:
        """Check that the command could run, and leave the files that it would leave."""
        words = shown.words
        if words[:2] == ["translution", "calibrate"]:
            self._type(shown)
        if words[:2] != ["translution", "launch"]:
            return
        plan = self.folder / words[2]
        assert (plan / "plan.json").exists(), f"{shown}: the page has no such plan"
        if "--resume" not in words:
            assert run([*words[1:], "--dry-run"]) == 0, f"{shown}: {self.capsys.readouterr().err}"
        if self.trained is not None and not (plan / "runs").exists():
            shutil.copytree(self.trained, plan / "runs" / "001")


@pytest.fixture
def quick_ranks(monkeypatch: pytest.MonkeyPatch, forked_launch: None) -> None:
    monkeypatch.setattr(calibrate, "_run", write_rates)
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", SerialExecutor)
    monkeypatch.setattr(calibrate, "prepare_ops", lambda *_: None)


_trained: list[Path] = []
PAGES = sorted((str(path.relative_to(ROOT)) for path in reader_pages()), key=lambda page: page != LIVE)


@needs_two_cores
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(
    page: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    quick_ranks: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, page)
    reader = Reader(page, tmp_path, capsys, _trained[0] if _trained else None)
    shown_here = {shown.line: shown for shown in commands(ROOT / page)}
    excerpts = {fence.line: fence for fence in fences((ROOT / page).read_text()) if fence.language == "output"}
    for line in sorted({*shown_here, *excerpts}):
        if line in shown_here:
            reader.follow(shown_here[line])
        else:
            difference = first_difference(("…", *excerpts[line].lines, "…"), reader.last)
            assert difference is None, f"{page}:{line}: {difference}"
    if page == LIVE:
        # This test's own folder is removed when it has passed.
        kept = tmp_path_factory.mktemp("trained") / "001"
        _trained.append(Path(shutil.copytree(tmp_path / "plans" / "digits" / "runs" / "001", kept)))


ON_RANKS = tuple(f"docs/integrations/{name}.md" for name in ("accelerate", "ddp", "huggingface"))
"""Pages whose Python runs on several ranks, in tests/docs/test_integrations.py, as every ``# train.py``."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(lightning|torchmetrics)")
@pytest.mark.filterwarnings("ignore:The .srun. command is available")  # Where Slurm is installed.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.. is deprecated:FutureWarning")  # Lightning's use of torch.
@pytest.mark.parametrize("page", [page for page in PAGES if programs(ROOT / page) and page not in ON_RANKS])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, page)
    here = [fence for fence in programs(ROOT / page) if fence.lines[0] != "# train.py"]
    text = "\n".join("\n".join(fence.lines) for fence in here)
    if "load_network" in text:
        pytest.importorskip("safetensors")
        assert _trained, "docs/commands.md is tested first"
        assert run(["export", str(_trained[0]), "--out", "digits.safetensors"]) == 0
    if "import timm" in text:
        load_timm()
    if "import lightning" in text:
        assert all(run(shown.words[1:]) == 0 for shown in commands(ROOT / page))
    if "small.json" in text:
        assert run(["report", "plans/small", "--out", "small.html", "--data", "small.json"]) == 0
    if "deepspeed" in text:
        script = tmp_path / "script.py"
        script.write_text(text)
        run_ranks_of([script], 1, tmp_path / "log")
    else:
        try:
            exec(compile(text, page, "exec"), {"__name__": "page"})
        finally:
            leave_process_group()  # Lightning leaves that to the end of its process.


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_a_page_leaves_to_another_test_is_run_there(kind: str) -> None:
    place = ELSEWHERE[kind]
    file, _, function = place.partition("::")
    words = kind.split()
    if file == ".ci/run":
        assert kind in (ROOT / file).read_text().splitlines()
        return
    path = ROOT / "tests" / file
    source = source_with_helpers(path, function)
    assert source, f"{place} does not exist"
    if function.endswith("of_a_page_work"):
        live = [shown.words for shown in commands(ROOT / LIVE)]
        assert any(shown[1] == words[0] for shown in live)
    elif words[0] == "sh":
        assert f'"{Path(words[1]).name}"' in source, f"{place} does not run {words[1]}"
    elif words[0] not in ("make", "python"):
        subcommand = words[1] if words[0] == "sbatch" else words[0]
        assert f'"{subcommand}"' in source, f"{place} runs no {subcommand}"
        for option in words[1:]:
            assert f'"{option}"' in source, f"{place} does not take {option}"


def test_nothing_is_left_to_other_tests_that_no_page_shows() -> None:
    kinds = {shown.kind for path in reader_pages() for shown in commands(path)}
    assert set(ELSEWHERE) <= kinds


def test_the_demo_is_made_of_commands_that_are_tested() -> None:
    text = (ROOT / "examples" / "demo.sh").read_text().replace("\\\n", "")
    typed = [line.split()[1] for line in text.splitlines() if line.startswith("translution ")]
    assert typed == ["estimate", "plan", "launch", "verify", "report"]
    assert {shown.words[1] for shown in commands(ROOT / LIVE)} >= set(typed)
    assert "sh examples/demo.sh" in (ROOT / "Makefile").read_text()


def test_the_comparison_of_memory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    script = ROOT / "benchmarks" / "accuracy.py"
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--only", "times", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "accuracy.md").read_text().strip()
