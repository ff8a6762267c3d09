"""Texts that specs, plans and measurements hold: one line, without control characters."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import AfterValidator, BaseModel

from translution.planner.common.errors import InputError
from translution.planner.common.files import check_new_folder
from translution.planner.common.types import check_line, printable
from translution.planner.config.loading import load_model
from translution.planner.config.training import TrainingSpec
from translution.planner.config.zero import OffloadOptimizer
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.plan import Plan, load_plan
from translution.planner.search.plan_search import plan as search_plan
from translution.planner.search.space import SearchConstraints

BAD = ["a\nb", "a\r", "\x1b[31mred", "tab\t", "nul\x00", "\x7f", "\x85", "next\u2028line", "\u202etxt.exe", "\udc80"]


@pytest.mark.parametrize("text", BAD)
def test_control_characters_are_refused_and_can_be_shown(text: str) -> None:
    with pytest.raises(ValueError, match="is not allowed: must be one line without control characters") as error:
        check_line(text)
    assert str(error.value).isprintable()
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    "text", ["", "a b", 'it\'s "quoted" $(x) `y`', "α-Translution 模型 😀", "/data/my\u00a0images"]
)
def test_any_other_text_is_allowed(text: str) -> None:
    assert check_line(text) == printable(text) == text


VIT = {"family": "vit", "image": 32, "patch": 8, "classes": 10, "dim": 32, "depth": 1, "heads": 2}
CPU = {"device": "cpu", "ranks_per_node": 1, "device_memory_bytes": 2**33}


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("name", lambda text: load_model(VIT | {"name": text})),
        ("name", lambda text: load_cluster(CPU | {"name": text})),
        ("measured.machine", lambda text: load_cluster(CPU | {"measured": {"machine": text}})),
        ("nvme_path", lambda text: search_plan(VIT, CPU, nvme_path=text, data="synthetic")),
        ("data_path", lambda text: search_plan(VIT, CPU, data="images", data_path=text)),
    ],
    ids=["model", "cluster", "machine", "nvme", "data"],
)
def test_the_error_for_a_name_or_a_path_names_field_and_value(field: str, make: Any) -> None:
    with pytest.raises(InputError) as error:
        make("a\n\x1b[31m b")
    message = str(error.value)
    assert f": {field}: 'a\\n\\x1b[31m b' is not allowed: must be one line without control characters" in f": {message}"
    assert message.isprintable()


def test_the_name_of_a_cluster_file_is_its_clusters_name(tmp_path: Path) -> None:
    (tmp_path / "a\nb.yaml").write_text("base: 8xH100\n")
    with pytest.raises(InputError, match=r"name: 'a.nb' is not allowed") as error:
        load_cluster(tmp_path / "a\nb.yaml")
    assert str(error.value).isprintable()


def test_a_folder_whose_path_has_a_line_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^folder: '.*plan.nrm' is not allowed: must be one line"):
        check_new_folder(tmp_path / "plan\nrm", marker="plan.json")
    assert check_new_folder(tmp_path / "my 'plan'", marker="plan.json") is False


def test_the_plan_of_a_stranger_is_refused_too(root: Path, tmp_path: Path) -> None:
    found = search_plan(root / "examples" / "digits.yaml", "cpu:1").plan
    document = json.loads(found.model_dump_json())
    document["prediction"]["peaks"][0]["entries"][0]["formula"] = "1\x1b]0;"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"formula: '1.x1b\]0;' is not allowed"):
        load_plan(tmp_path)


def bare_texts(schema: type[BaseModel], seen: set[type]) -> list[str]:
    """Return the fields of a schema, and of those within it, that take any text."""
    seen.add(schema)
    found = []
    hints = typing.get_type_hints(schema, include_extras=True)
    for name in schema.model_fields:
        parts, stack = [], [hints[name]]
        while stack:
            part = stack.pop()
            checked = typing.get_origin(part) is typing.Annotated and any(
                isinstance(each, AfterValidator) and each.func is check_line for each in part.__metadata__
            )
            if not checked and typing.get_origin(part) is not typing.Literal:
                parts.append(part)
                stack += typing.get_args(part)[: 1 if typing.get_origin(part) is typing.Annotated else None]
        for part in parts:
            if part is str:
                found.append(f"{schema.__name__}.{name}")
            elif isinstance(part, type) and not isinstance(part, types.GenericAlias) and issubclass(part, BaseModel):
                found += bare_texts(part, seen) if part not in seen else []
    return found


def test_every_text_of_a_plan_is_a_line_or_has_rules_of_its_own() -> None:
    seen: set[type] = set()
    found = bare_texts(Plan, seen) + bare_texts(SearchConstraints, seen)
    assert {TrainingSpec, OffloadOptimizer} <= seen
    assert set(found) == {
        "VitSpec.roles", "VitSpec.relative_layers", "GptSpec.roles", "GptSpec.relative_layers", "VideoSpec.roles",
        "VideoSpec.relative_layers",  # the layers and roles that exist
        "SearchConstraints.offload",  # the modes that exist
        "SearchConstraints.zero_overrides",  # the fields of ZeroSpec
    }  # fmt: skip
