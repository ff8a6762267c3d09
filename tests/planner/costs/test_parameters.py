"""Closed-form parameter counts compared with the paper's figures and with built networks."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from translution.models import build
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, override, parse_model_spec
from translution.planner.config.parallel import deal_relations
from translution.planner.costs.parameters import (
    TABLES,
    ParameterGroup,
    count_parameters,
    owned_parameter_groups,
    parameter_groups,
    table_tiles,
)

GOLDEN = list(csv.DictReader((Path(__file__).parents[2] / "data" / "parameters.csv").read_text().splitlines()))


def golden_spec(row: dict[str, str]) -> ModelSpec:
    rank = int(row["rank"]) if row["rank"] else None
    return override(
        preset(f"{row['family']}-{row['size']}/{row['patch'] or row['seq']}"),
        operator=row["operator"],
        roles=row["roles"] or None,
        c1=rank,
        c2=rank,
        relative_layers=row["translution_layers"] or None,
    )


def test_the_golden_file_is_complete() -> None:
    assert len(GOLDEN) == 125


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "-".join(filter(None, list(row.values())[:-1])))
def test_the_count_equals_the_figure_of_the_paper(row: dict[str, str]) -> None:
    # Source: golden figures of the project, from the sizes and tables of arXiv 2510.10060.
    assert count_parameters(golden_spec(row)).total == int(row["params"])


SMALL_VIT = {"family": "vit", "image": [12, 8], "patch": 4, "channels": 2, "classes": 7, "dim": 24, "depth": 3}
SMALL_GPT = {"family": "gpt", "context": 11, "vocabulary": 13, "dim": 24, "depth": 3}
VARIANTS = [
    {"operator": "attention"},
    {"operator": "attention", "rotary": True, "head_dim": 8},
    *({"operator": "translution", "roles": roles} for roles in ("qkv", "kv", "qv", "qk", "q", "k", "v")),
    *({"operator": "alpha", "roles": roles, "c1": 3, "c2": 5} for roles in ("qkv", "kv", "qv", "qk", "q", "k", "v")),
    {"operator": "translution", "relative_layers": "first:1", "head_dim": 8},
    {"operator": "alpha", "relative_layers": [0, 2], "rotary": True, "head_dim": 8},
    {"operator": "translution", "heads": 1},
    {"operator": "translution", "window": 1},
    {"operator": "bias"},
    {"operator": "shaw"},
    *({"operator": "absolute", "roles": roles} for roles in ("qkv", "kv", "q")),
    {"operator": "shaw", "relative_layers": "every:2", "head_dim": 8},
    {"operator": "bias", "window": 1},
    {"operator": "attention", "norm": "rms"},
    {"operator": "translution", "bias": False, "roles": "kv"},
    {"operator": "alpha", "ffn": "swiglu"},
    {"operator": "attention", "heads": 4, "kv_heads": 2, "bias": False, "norm": "rms", "ffn": "swiglu"},
    {"operator": "translution", "relative_layers": "first:1", "head_dim": 8, "heads": 2, "kv_heads": 1},
]


@pytest.mark.parametrize("tile", [None, 1, 4])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", [SMALL_VIT, SMALL_GPT], ids=lambda family: str(family["family"]))
def test_every_tensor_of_the_built_network_is_counted(
    family: dict[str, object], variant: dict[str, object], tile: int | None
) -> None:
    spec = parse_model_spec({"heads": 2, **family, **variant})
    with torch.device("meta"):
        network = build(spec, tile_relations=tile)
    shapes = Counter(tuple(parameter.shape) for parameter in network.parameters())
    counted: Counter[tuple[int, ...]] = Counter()
    for group in parameter_groups(spec, tile):
        counted[group.shape] += group.copies
    assert counted == shapes


def test_mean_pool_without_class_token_is_counted() -> None:
    spec = parse_model_spec(SMALL_VIT | {"heads": 2, "pool": "mean", "class_token": False})
    with torch.device("meta"):
        network = build(spec)
    assert count_parameters(spec).total == sum(parameter.numel() for parameter in network.parameters())


def test_components_add_up_and_tables_dominate() -> None:
    count = count_parameters(preset("vit-base/16"))
    assert sum(count.components.values()) == count.total
    assert count.components["relation tables"] / count.total > 0.99


def test_tiles_cover_a_table() -> None:
    assert table_tiles(10, 4) == ((4, 2), (2, 1))
    assert table_tiles(8, 4) == ((4, 2),)
    assert table_tiles(3, 4) == ((3, 1),)
    assert table_tiles(3, None) == ((3, 1),)


@pytest.mark.parametrize(
    "changes", [{}, {"operator": "alpha"}, {"relative_layers": "first:3"}, {"roles": "v"}], ids=str
)
def test_a_rank_of_a_relation_group_has_its_relations_and_everything_else(changes: dict[str, object]) -> None:
    spec = override(preset("vit-small/32"), **changes)
    owners = Counter(deal_relations(spec.geometry, 5))
    whole, own = parameter_groups(spec, 7), owned_parameter_groups(spec, 7, 5)
    assert owned_parameter_groups(spec, 7) == whole

    def matrices(groups: tuple[ParameterGroup, ...]) -> int:
        return sum(group.shape[0] * group.copies for group in groups if group.component == TABLES)

    relations = spec.geometry.relations
    assert matrices(own) * relations == matrices(whole) * max(owners.values())
    assert max(group.shape[0] for group in own if group.component == TABLES) == 7
    assert [g for g in own if g.component != TABLES] == [g for g in whole if g.component != TABLES]
