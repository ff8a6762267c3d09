"""What a report is to show, as the options of ``translution report`` say it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from translution.planner.config import ModelSpec, load_model
from translution.planner.hardware import ClusterSpec, load_cluster


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """The contents of a report; models and clusters by the names that the user gave."""

    plans: tuple[Path, ...] = ()
    models: dict[str, ModelSpec] = field(default_factory=dict)
    compared: dict[str, ModelSpec] = field(default_factory=dict)
    scaled: tuple[str, ModelSpec] | None = None
    cluster: tuple[str, ClusterSpec] | None = None
    experiments: Path | None = None
    accuracy: Path | None = None
    step_time: Path | None = None
    benchmarks: Path | None = None
    gpu: Path | None = None
    public: Path | None = None
    snapshot: Path | None = None
    snapshot_steps: int = 1

    @property
    def of_plans(self) -> bool:
        """True if the request is for plans and their runs, and nothing else."""
        snapshot, steps = self.snapshot, self.snapshot_steps
        return self == ReportRequest(self.plans, cluster=self.cluster, snapshot=snapshot, snapshot_steps=steps)

    @property
    def of_one_plan(self) -> bool:
        """True if the request is for one plan and nothing else."""
        return self.of_plans and len(self.plans) == 1

    def required_cluster(self) -> tuple[str, ClusterSpec]:
        """Return the name of the cluster that models are planned for, and the cluster."""
        assert self.cluster is not None
        return self.cluster

    @classmethod
    def load(
        cls,
        *,
        plans: Sequence[Path],
        models: Sequence[str],
        compared: Sequence[str],
        scaled: str | None,
        cluster: str,
        experiments: Path | None,
        accuracy: Path | None,
        step_time: Path | None,
        benchmarks: Path | None,
        gpu: Path | None = None,
        public: Path | None = None,
        snapshot: Path | None = None,
        snapshot_steps: int = 1,
    ) -> ReportRequest:
        """Return the request with its models and cluster read.

        Args:
            plans: plan folders or run folders.
            models: presets or files whose costs and best plans are shown.
            compared: presets or files whose operators are compared.
            scaled: preset or file from which sizes and nodes are scaled up.
            cluster: name or file; read only if there is a model.
            experiments: folder of experiment results.
            accuracy: file with measured accuracy of the predictions.
            step_time: file with measured step times.
            benchmarks: folder of benchmark results.
            gpu: folder of the results of ``scripts/gpu_check.py``.
            public: file with predicted and published step times.
            snapshot: memory snapshot of torch that is laid over the plan.
            snapshot_steps: number of optimizer steps that it recorded.

        Raises:
            InputError: if a name is unknown, or a file is invalid.
        """
        has_models = bool(models or compared or scaled is not None)
        return cls(
            plans=tuple(plans),
            models={name: load_model(name) for name in models},
            compared={name: load_model(name) for name in compared},
            scaled=None if scaled is None else (scaled, load_model(scaled)),
            cluster=(cluster, load_cluster(cluster)) if has_models else None,
            experiments=experiments,
            accuracy=accuracy,
            step_time=step_time,
            benchmarks=benchmarks,
            gpu=gpu,
            public=public,
            snapshot=snapshot,
            snapshot_steps=snapshot_steps,
        )

    def arguments(self) -> Iterator[str]:
        """Yield the arguments of `translution report` that make this request."""
        yield from map(str, self.plans)
        for option, names in (("--model", self.models), ("--compare", self.compared)):
            for name in names:
                yield from (option, name)
        if self.scaled is not None:
            yield from ("--scaling", self.scaled[0])
        if self.cluster is not None:
            yield from ("--cluster", self.cluster[0])
        files = {
            "--accuracy": self.accuracy,
            "--step-time": self.step_time,
            "--experiments": self.experiments,
            "--benchmarks": self.benchmarks,
            "--gpu": self.gpu,
            "--public": self.public,
            "--snapshot": self.snapshot,
        }
        for option, path in files.items():
            if path is not None:
                yield from (option, str(path))
        if self.snapshot_steps != 1:
            yield from ("--snapshot-steps", str(self.snapshot_steps))
