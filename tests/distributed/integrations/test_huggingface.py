"""A plan as arguments of Hugging Face's Trainer; what runs on ranks is in tests/docs/test_integrations.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.runs import write_plan

from translution.distributed.integrations import lightning_options, trainer_arguments
from translution.planner.common.errors import InputError, MissingPackageError


def test_a_trainer_needs_the_plans_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path / "plan", 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE: 1 is not allowed: must be 2, as planned"):
        trainer_arguments(plan, tmp_path / "out")


def test_plans_whose_ranks_share_out_the_relations_are_refused(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", 2, relation_parallel=2)
    with pytest.raises(
        InputError, match=r"parallel\.relation: 2 is not allowed: must be 1 for Hugging Face's Trainer; "
    ):
        trainer_arguments(plan, tmp_path / "out")
    with pytest.raises(InputError, match=r"must be 1 for Lightning's Trainer; translution launch runs this plan"):
        lightning_options(plan)


def test_a_plan_of_an_earlier_version_must_be_made_again(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", 2)
    (plan / "ds_config_hf.json").unlink()
    with pytest.raises(InputError, match=r"plan: has no ds_config_hf\.json: plan again"):
        trainer_arguments(plan, tmp_path / "out")


@pytest.mark.parametrize(("package", "function"), [("accelerate", trainer_arguments), ("lightning", lightning_options)])
def test_a_missing_package_is_named(package: str, function: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["plan", "out"] if function is trainer_arguments else ["plan"]
    with pytest.raises(MissingPackageError, match=rf"{package} .*: pip install 'translution-scale\[integrations\]'"):
        function(*arguments)  # type: ignore[operator]
