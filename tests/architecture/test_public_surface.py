"""What each package exports, and that nothing reaches behind it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP_FOLDERS = ("planner", "models", "distributed", "reports", "cli")
USERS = (*TOP_FOLDERS, "benchmarks", "examples", "scripts")
"""Folders that use the top folders through their packages; tests may import any module."""

PUBLIC: dict[str, list[str]] = {
    "translution.planner": [
        "BreakdownItem",
        "ClusterSpec",
        "Comparison",
        "ComparisonRow",
        "DoesNotFitError",
        "GptSpec",
        "GrowthPoint",
        "InputError",
        "MemoryEstimate",
        "ModelCosts",
        "ModelSpec",
        "NoPlanFits",
        "OffloadMode",
        "OperatorCosts",
        "Phase",
        "PhasePeak",
        "Plan",
        "RunConfig",
        "RunCost",
        "SearchConstraints",
        "SearchResult",
        "StepTime",
        "Tier",
        "TrainingSpec",
        "TranslutionError",
        "VideoSpec",
        "VitSpec",
        "ZeroSpec",
        "compare",
        "estimate",
        "load_cluster",
        "load_model",
        "load_plan",
        "make_plan",
        "plan",
        "save_model",
        "scaling",
    ],
    "translution.models": [
        "AbsoluteTranslution",
        "AlphaTranslution",
        "BiasAttention",
        "LanguageModel",
        "SelfAttention",
        "ShawAttention",
        "Translution",
        "VisionTransformer",
        "build",
        "load_network",
        "load_published",
        "load_tables",
        "replace_attention",
        "tables_from_state_dict",
        "to_published",
    ],
    "translution.distributed": [
        "ExperimentResult",
        "LaunchResult",
        "LaunchTarget",
        "PreparedImages",
        "RankStatus",
        "RunMode",
        "RunStatus",
        "TokenMeta",
        "find_experiment",
        "launch",
        "leave_process_group",
        "prepare_images",
        "prepare_tokens",
        "read_run_status",
        "run_experiment",
    ],
    "translution.reports": [
        "EXPERIMENT_FILE",
        "EXPERIMENT_PICTURE",
        "EXPERIMENT_TABLE",
        "ReportFiles",
        "ReportRequest",
        "check_comparison_files",
        "check_experiment_folder",
        "load_document",
        "write_comparison",
        "write_experiment",
        "write_report",
    ],
}


def packages(root: Path) -> list[str]:
    found = (path.parent for folder in TOP_FOLDERS for path in (root / folder).rglob("__init__.py"))
    return sorted("translution." + ".".join(path.relative_to(root).parts) for path in found)


def absolute_imports(path: Path) -> Iterator[str]:
    """Dotted names of ours that a module imports absolutely: `a.b` for `import a.b` and for `from a import b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("translution."))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_top_folder_exports_its_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])


def test_every_package_exports_names_that_exist(root: Path) -> None:
    missing = []
    for name in packages(root):
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", None)
        if exported is None:
            missing.append(f"{name}.__all__")
        else:
            missing += [f"{name}.{member}" for member in exported if not hasattr(module, member)]
    assert missing == []


@pytest.mark.parametrize("folder", USERS)
def test_other_folders_import_packages_and_not_their_modules(folder: str, root: Path) -> None:
    behind = []
    for path in sorted((root / folder).rglob("*.py")):
        for name in absolute_imports(path):
            parts = name.split(".")[1:]
            # The longest part of the name that is a module's file is what the import reaches.
            if any((root / Path(*parts[:end])).with_suffix(".py").exists() for end in range(2, len(parts) + 1)):
                behind.append(f"{path.relative_to(root).as_posix()} imports {name}")
    assert behind == []
