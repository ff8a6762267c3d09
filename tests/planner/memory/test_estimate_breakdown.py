"""The formula and the source of every item of a memory breakdown."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from translution.planner.config.loading import preset
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.memory.items import describe_item
from translution.planner.plans.defaults import choose_zero
from translution.planner.simulator.engine import base
from translution.planner.simulator.engine.base import EngineConfig
from translution.planner.simulator.network import group_ops, model, ops, relation_ops

OWN_FOLDERS = ("planner", "models", "distributed")


def item_names(*modules: ModuleType) -> list[str]:
    return [value for module in modules for key, value in vars(module).items() if key.isupper() and type(value) is str]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_source_in_this_project_exists(stage: Any, root: Path) -> None:
    spec = preset("vit-tiny/56")
    zero = choose_zero(spec, None, stage, 8)
    training = TrainingSpec(precision="bf16", micro_batch=1, data="synthetic")
    config = EngineConfig(RunConfig(spec, load_cluster("8xH100"), training, zero))
    sources = {describe_item(name, config)[1] for name in item_names(base, group_ops, model, ops, relation_ops)}
    own = {source for source in sources if source.split("/")[0] in OWN_FOLDERS}
    assert len(own) >= 6
    assert {source for source in own if not (root / source).exists()} == set()
