from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import chance
from helpers.browser import Browser, find_browser
from helpers.fake_ops import FakeOps
from helpers.report_folders import MALICIOUS, built_once, experiment_folder, plan_folder, run_folder
from helpers.runs import forked_ranks, has_libaio
from xdist.scheduler import LoadScopeScheduling

from translution.cli.main import run
from translution.distributed.launcher import launcher
from translution.distributed.system.compiled_ops import extensions_folder, prepare_ops
from translution.distributed.system.environment import launch_environment
from translution.planner.hardware.cluster import local_cpu_cluster

chance.load_profile()

os.environ["CXX"] = str(Path(__file__).parent / "programs" / "cxx.py")

# OpenMP's threads wait for each other in a loop. While other tests keep the cores busy, those for whom they wait do not
# run meanwhile: a run of one rank with two threads took 87 s of processor time in place of 15.
os.environ["OMP_WAIT_POLICY"] = "passive"
# The tests' tensors are tiny: two threads would mostly wait for each other. Lightning takes all cores without this.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Unless this variable is set, a rank has the C library give blocks of 128 KiB or more back as soon as they are free.
# With the tests' small models, getting them again takes a third of its processor time.
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"

# jsonschema, which altair imports, would build 38 grammars from it, in every worker and in every command with a chart,
# to check formats that nobody asks for.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

# Programs that a shell starts in the background ignore Ctrl-C, and launches that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
STARTS_RANKS = (
    "tests/integration",
    "tests/benchmarks/test_faults.py",
    "tests/docs/test_integrations.py",
    "tests/docs/test_pages.py",
    "tests/distributed/checkpoint/test_weights.py",
    "tests/distributed/training/test_relation_groups.py",
)
"""Tests that start ranks. In one session they run last; they wait for DeepSpeed's ops, which compile for minutes."""
LONGEST = (
    "test_pages",
    "test_kills",
    "test_hosts",
    "test_offload",
    "test_slurm",
    "test_gpu_check",
    "test_reshard",
    "test_relation_groups",
)
"""Files of such tests that take longest as a whole or have the longest tests: they begin first."""
COMPILING = "TRANSLUTION_TESTS_COMPILING"
"""Environment variable: a file that exists while ops compile."""
COMPLETE = "TRANSLUTION_TESTS_COMPLETE"
"""Environment variable: if it is set, a test that is left out fails the session, unless the machine itself is why."""
OF_THE_MACHINE = ("needs root", "needs two cores")
"""Reasons that no package removes."""
_compiling: list[threading.Thread] = []


def starts_ranks(item: pytest.Item) -> bool:
    path = item.path.relative_to(ROOT).as_posix()
    return path.startswith(STARTS_RANKS)


@pytest.hookimpl(tryfirst=True)  # Before pytest leaves out what `-m` does not name.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gallery_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (starts_ranks(item), item.path.stem not in LONGEST))


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no types
    """A worker runs all tests of a file; those of a file in `APART`, which share nothing, run on any worker.

    Tests that start ranks wait for them half of the time. Half of the workers run such tests, so that the processor is
    busy, and none is the last; while ops compile, which such tests wait for, they run others.
    """

    APART = (
        "tests/benchmarks/test_faults.py",
        "tests/integration/test_accuracy.py",
        "tests/integration/test_resume.py",
        "tests/integration/test_runs.py",
        "tests/models/ops/fused/test_kernels.py",
    )

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in self.APART else file

    def _assign_work_unit(self, node: object) -> None:
        self.workqueue.move_to_end(self._next_scope(), last=False)
        super()._assign_work_unit(node)

    def _next_scope(self) -> str:
        rest = [scope for scope in self.workqueue if not scope.startswith(STARTS_RANKS)]
        ranks = [scope for scope in self.workqueue if scope.startswith(STARTS_RANKS)]
        prefer_ranks = not are_ops_compiling() and self._workers_with_ranks() < len(self.nodes) / 2
        first, second = (ranks, rest) if prefer_ranks else (rest, ranks)
        return (first or second)[0]

    def _workers_with_ranks(self) -> int:
        """Return the number of workers that have tests to run that start ranks."""
        return sum(
            any(scope.startswith(STARTS_RANKS) and not all(unit.values()) for scope, unit in units.items())
            for units in self.assigned_work.values()
        )

    def _reschedule(self, node: object) -> None:
        # A worker runs its last test when it knows the next one. The original gives it more when it has two left: the
        # second of them may take a minute, while others, who have none, could do what waits behind it.
        if not self.workqueue or self._pending_of(self.assigned_work[node]) <= 1:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "compile DeepSpeed's ops at the start; with pytest-xdist its workers cannot"
    parser.addoption("--compile-ops", action="store_true", help=text)


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is one of pytest-xdist's workers."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)  # Workers inherit the environment.
def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--compile-ops") and not is_worker(session.config):
        start_to_compile()


def pytest_sessionfinish(session: pytest.Session) -> None:
    for thread in _compiling:
        thread.join()
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if COMPLETE in os.environ and reporter is not None and not session.exitstatus and avoidable(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def left_out(reporter: pytest.TerminalReporter) -> Counter[str]:
    """Return the reasons for which tests were left out, with their numbers."""
    reports = reporter.stats.get("skipped", [])
    return Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)


def avoidable(reporter: pytest.TerminalReporter) -> list[str]:
    """Return the reasons that a package would remove."""
    return [reason for reason in left_out(reporter) if reason not in OF_THE_MACHINE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the tests that were left out, by reason."""
    for reason, count in left_out(terminalreporter).most_common():
        terminalreporter.write_line(f"{count} test{'s' * (count > 1)} left out: {reason}", yellow=True)
    if COMPLETE in os.environ and avoidable(terminalreporter):
        terminalreporter.write_line(f"{COMPLETE} is set: no test may be left out for want of a package", red=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage less often, and start to compile the ops that ranks load, for which their first test waits."""
    config = session.config
    # What was imported and collected stays. Otherwise Python goes through all of it again and again, in a fifth of the
    # planner's tests' time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if not (config.option.collectonly or is_worker(config) or _compiling) and any(map(starts_ranks, session.items)):
        start_to_compile()


def start_to_compile() -> None:
    handle, marker = tempfile.mkstemp(prefix="translution-tests-compiling-")
    os.close(handle)
    os.environ[COMPILING] = marker
    _compiling.append(threading.Thread(target=compile_ops, args=(Path(marker),)))
    _compiling[0].start()


def compile_ops(marker: Path) -> None:
    ops = ["ShareMemCommBuilder", "CPUAdamBuilder"]
    if has_libaio():
        ops.append("AsyncIOBuilder")
    environment = launch_environment(local_cpu_cluster(1)) | {"MAX_JOBS": "2"}
    log = Path(tempfile.gettempdir()) / f"translution-ops-{os.getpid()}.log"
    try:
        prepare_ops(ops, environment, log)
    finally:
        shutil.rmtree(extensions_folder() / "precompiled", ignore_errors=True)
        marker.unlink()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # However long it takes: the session that compiles removes the file, also when it fails.
    while starts_ranks(item) and are_ops_compiling():
        time.sleep(0.2)


def are_ops_compiling() -> bool:
    return COMPILING in os.environ and Path(os.environ[COMPILING]).exists()


@pytest.fixture(autouse=True)
def world_of_its_own() -> Iterator[None]:
    """Lightning and others leave a rank's variables in the environment, which a later test's job would inherit."""
    names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture
def root() -> Path:
    """Root folder of the repository."""
    return ROOT


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory reads as NaN."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's CPU kernels use one thread: each thread allocates its own blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def fake_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    """Processes that the test starts find a stand-in for DeepSpeed, and an empty folder of ops."""
    made = FakeOps(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(made.python))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(made.extensions))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    return made


@pytest.fixture
def forked_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of this process fork their ranks, without DeepSpeed's launcher, whose start takes seconds."""
    monkeypatch.setattr(launcher, "run_ranks", forked_ranks)


@pytest.fixture(scope="session")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report next to its plan folder: a malicious name and three runs; the second is the newest measured one."""
    return built_once(tmp_path_factory, "report", build_report) / "report.html"


def build_report(folder: Path) -> None:
    plan_folder(folder / "plan", name=MALICIOUS)
    for number, name in enumerate(("001", "002", "003")):
        path = run_folder(folder / "plan", name, more=1000 * number)
        os.utime(path, (number, number))
    (path / "memory" / "rank_0.json").unlink()
    os.utime(path, (9, 9))
    assert run(["report", str(folder / "plan"), "--out", str(folder / "report.html")]) == 0


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("needs chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.events.clear()
    return chromium


@pytest.fixture(scope="session")
def gallery_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all sections, as page, Markdown and JSON, about models that are searched in seconds."""
    return built_once(tmp_path_factory, "gallery", build_gallery)


def build_gallery(folder: Path) -> None:
    from translution.reports import builder

    plan_folder(folder / "plan", name=MALICIOUS)
    run_folder(folder / "plan", "001")
    experiment_folder(folder / "experiments" / "shift")
    experiment_folder(folder / "experiments" / "language", "language", quick=True)
    words = ["report", str(folder / "plan"), "--model", "vit-tiny/56", "--model", "gpt-tiny/160"]
    words += ["--compare", "vit-tiny/56", "--scaling", "vit-tiny/56", "--cluster", "2xRTX4090"]
    words += ["--accuracy", str(ROOT / "reports" / "accuracy.json"), "--experiments", str(folder / "experiments")]
    words += ["--step-time", str(ROOT / "reports" / "step_time.json")]
    words += ["--public", str(ROOT / "reports" / "public.json")]
    words += ["--benchmarks", str(ROOT / "benchmarks" / "results"), "--out", str(folder / "index.html")]
    words += ["--markdown", str(folder / "README.md"), "--data", str(folder / "gallery.json")]
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(builder.growth_points, axes=("width",), factors=(1, 64))
        patch.setattr(builder, "growth_points", few)
        patch.setattr(builder, "thresholds", functools.partial(builder.thresholds, axes=("depth",)))
        assert run(words) == 0
