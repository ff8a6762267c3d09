"""The calculator and the command line make the same plan of a choice; errors name the field."""

from __future__ import annotations

import io
import json
import stat
import zipfile
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
from helpers.chance import examples
from hypothesis import given
from hypothesis import strategies as st

from translution.cli.main import run
from translution.planner.plans.plan import load_plan
from translution.reports.calculator.choice import (
    FIELDS,
    Choice,
    ChoiceError,
    choice_arguments,
    parse_choice,
    search_input,
    spec_files,
)
from translution.reports.calculator.form import form_sections
from translution.reports.calculator.pages import (
    free_choice,
    page_query,
    point_choice,
    query_of,
    render_answer,
    render_page,
)
from translution.reports.calculator.result import Outcome, costs_of, plan_zip, search_choice
from translution.reports.calculator.search_pool import neighbour_choices, popular_choices
from translution.reports.calculator.verdict import Answer, PageChoice, parse_page


def choice_of(query: str) -> Choice:
    return parse_choice(parse_qsl(query, keep_blank_values=True))


SAME = (
    "model=vit-tiny/56&gpus=2",
    "model=gpt-tiny/160&gpus=2&precision=fp32&optimizer=lion&stage=2&offload=cpu-optimizer&global_batch=32&steps=7",
    "model=vit-tiny/56&operator=alpha&roles=qk&c1=4&c2=4&depth=3&dim=96&heads=2&image=112&patch=28&gpus=1"
    "&checkpointing=block&micro_batch=4&accumulation=2&minimize=memory&headroom=0.2",
    "model=vit-tiny/56&gpus=2&nodes=2&host_memory=64&all_nodes=true&stage=3&tile_relations=5&gpu=a100-80"
    "&relative_layers=first:2&other_layers=alpha&nvme_path=/nvme/a b&window=2",
    "model=vit-tiny/56&gpus=2&price=2.5&stage=3&offload=cpu-optimizer&offload_ratio=0.5&micro_batch=4"
    "&zero=overlap_comm=true,sub_group_elements=4000000",
    "model_yaml=family: vit%0D%0Adim: 96%0D%0Adepth: 2%0D%0Aheads: 3%0D%0Aimage: 64%0D%0Apatch: 16%0D%0A"
    "classes: 10%0D%0Aname: 'END'%0D%0Aoperator: alpha%0D%0Acheckpointing: block"
    "&cluster_yaml=base: 1x2xH100%0Aname: ours%0Ahost_memory_bytes: 99999999999"
    "%0Agpu_constants: {nccl: 1000000000}&depth=3&price=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("query", SAME)
def test_shown_command_makes_the_same_plan_and_folder(
    query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choice = choice_of(query)
    found = search_choice(choice)
    assert found.plan is not None, found.outcome
    monkeypatch.chdir(tmp_path)
    for name, text in spec_files(choice).items():
        Path(name).write_text(text)
    words = choice_arguments(choice)
    assert run(words[1:]) == 0, capsys.readouterr().err
    folder = Path(words[-1])
    assert load_plan(folder).model_dump_json() == found.plan.decode()
    archive = zipfile.ZipFile(io.BytesIO(plan_zip(found.plan)))
    names = sorted(path.name for path in folder.iterdir())
    assert [info.filename for info in archive.infolist()] == [f"plan/{name}" for name in names]
    for info, name in zip(archive.infolist(), names, strict=True):
        written = (folder / name).read_bytes()
        # The command ends the README with the reasons of its search.
        assert written.startswith(archive.read(info)) if name == "README.md" else archive.read(info) == written
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        assert (info.external_attr >> 16) & 0o777 == mode
    view = Outcome.model_validate_json(found.outcome).plan
    assert view is not None
    assert view.deepspeed_config == json.loads((folder / "ds_config.json").read_text())


def test_fields_that_another_field_rules_out_are_left_out() -> None:
    """The form keeps them for the next choice; a search would refuse them."""
    choice = choice_of("model=vit-tiny/56&minimize=nodes&all_nodes=1&offload=cpu-optimizer&nvme_path=/nvme")
    found = search_input(choice).constraints
    assert (found.minimize, found.nvme_path, found.all_nodes) == ("time", None, True)
    assert not {"--minimize", "--nvme-path"} & set(choice_arguments(choice))


def test_costs_equal_those_of_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "vit-tiny/32", "--precision", "bf16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["comparison"]
    costs = costs_of(choice_of("model=vit-tiny/32"))
    assert [row["operator"] for row in rows] == [row.operator for row in costs.operators]
    for row, cost in zip(rows, costs.operators, strict=True):
        assert cost.parameters == row["parameters"]["total"]
        assert (cost.saved_bytes, cost.published_saved_bytes) == tuple(
            row["activations_bytes"][way] for way in ("ours", "published")
        )
        assert cost.training_flops == row["flops_per_sample"]["training_step"]


@pytest.mark.parametrize(
    ("query", "field", "text"),
    [
        ("modle=vit-tiny/56", None, "did you mean 'model'?"),
        ("model=vit-tinny/56", "model", "did you mean"),
        ("model=vit-tiny/55", "model", "must divide the image height 224"),
        ("model=/etc/passwd", "model", "is not allowed"),
        ("model=secret.yaml", "model", "is not allowed"),
        ("gpu=H1000", "gpu", "did you mean 'H100'"),
        ("operator=none", "operator", "'translution'"),
        ("dim=0", "dim", "greater than or equal to 1"),
        ("dim=1e9", "dim", "valid integer"),
        ("depth=1000000", "depth", "less than or equal to 128"),
        ("heads=5", "heads", "must divide dim 768"),
        ("patch=15", "patch", "must divide"),
        ("model=vit-base/1", "model", "at most 8,192"),
        ("context=5", "context", "unknown key"),
        ("roles=qq", "roles", "must be one or more of q, k and v"),
        ("operator=attention&window=2", "window", "must be null"),
        ("relative_layers=first:99", "relative_layers", "from 1 to 12"),
        ("global_batch=7", "global_batch", "multiple of the 8 ranks"),
        ("micro_batch=3&global_batch=64", "global_batch", "multiple"),
        ("tile_relations=99999", "tile_relations", "must be from 1 to"),
        ("stage=5", "stage", "is not allowed"),
        ("stage=1&offload=cpu", "offload", "not allowed with stage 1"),
        ("offload=nvme", "nvme_path", "is required"),
        ("nvme_path=relative", "nvme_path", "absolute path"),
        ("nvme_path=/a%0Ab", "nvme_path", "absolute path"),
        ("headroom=nan", "headroom", "is not allowed"),
        ("gpus=2&gpus=4", "gpus", "given twice"),
        ("nodes=1025", "nodes", "less than or equal to 1024"),
        ("price=0", "price", "greater than 0"),
        ("offload_ratio=2", "offload_ratio", "less than or equal to 1"),
        ("zero=stage", "zero", "is not allowed"),
        ("zero=overlap=true", "zero", "unknown key 'overlap'"),
        ("zero=sub_group_elements=1", "zero", "sub_group_elements: 1 is not allowed: must be at least 156"),
        ("model=vit-base/32&model_yaml=family: vit", "model", "must be left out with model_yaml"),
        ("operator=alpha&model_yaml=family: vit", "operator", "must be left out with model_yaml"),
        ("nodes=2&cluster_yaml=base: 8xH100", "nodes", "must be left out with cluster_yaml"),
    ],
)
def test_invalid_choice_is_rejected_with_one_line_that_names_the_field(
    query: str, field: str | None, text: str
) -> None:
    with pytest.raises(ChoiceError) as caught:
        search_input(choice_of(query))
    assert caught.value.field == field
    assert text in caught.value.message
    assert "\n" not in caught.value.message


VALUES = st.one_of(
    st.text(max_size=8),
    st.integers(-2, 2**40).map(str),
    st.sampled_from(
        ["none", "cpu", "nvme", "alpha", "attention", "first:3", "block", "gpt-tiny/160", "/x", "true", "qk"]
    ),
)


def test_a_strange_name_that_is_given_twice_is_shown_on_one_line() -> None:
    with pytest.raises(ChoiceError) as caught:
        parse_choice([("a\n", "1"), ("a\n", "2")])
    assert caught.value.message == "'a\\n': is given twice"
    assert caught.value.field is None


@examples(60)
@given(st.lists(st.tuples(st.one_of(st.sampled_from(FIELDS), st.text(max_size=6)), VALUES), max_size=5))
def test_any_query_is_parsed_or_rejected(pairs: list[tuple[str, str]]) -> None:
    rejected: ChoiceError | None = None
    try:
        choice = parse_choice(pairs)
        search_input(choice)
    except ChoiceError as error:
        rejected = error
    if rejected is None:
        assert choice_of(query_of(choice)) == choice
    else:
        assert "\n" not in rejected.message
        assert rejected.field in (None, *FIELDS)


def test_query_contains_only_changes_and_restores_the_choice() -> None:
    assert query_of(Choice()) == ""
    assert query_of(choice_of("model=ViT-B/16&nodes=1&dim=&precision=bf16")) == "model=vit-mini%2F16"
    for query in SAME:
        choice = choice_of(query)
        assert choice_of(query_of(choice)) == choice


def test_choices_searched_in_idle_time_are_valid() -> None:
    choices = [*popular_choices(), *neighbour_choices(Choice()), *neighbour_choices(choice_of(SAME[2]))]
    for choice in choices:
        search_input(choice_of(query_of(choice)))
    assert Choice() in choices
    assert 200 < len(choices) < 1000


def test_page_links_to_advice_when_nothing_fits() -> None:
    choice = choice_of("model=gpt-tiny/160&gpu=RTX4090&gpus=1&headroom=0.9&stage=2&offload=none&global_batch=1")
    outcome = Outcome.model_validate_json(search_choice(choice).outcome)
    assert outcome.state == "nothing fits"
    assert outcome.no_plan is not None
    html = render_answer(PageChoice(choice), Answer(choice, costs_of(choice), outcome))
    assert "does not fit" in html
    assert '<h2 id="verdict-title" class="bad">Does not fit</h2>' in html
    changed = next(advice for advice in outcome.no_plan.advice if advice.kind == "hybrid")
    better = choice.replacing(**changed.changes)
    assert f'href="./?{query_of(better).replace("&", "&amp;")}"' in html
    assert search_choice(choice_of(query_of(better))).plan is not None


def test_form_has_every_field_once() -> None:
    names = [field.name for section in form_sections() for field in (*section.fields, *section.more, *section.own)]
    assert sorted(names) == sorted(FIELDS)


def test_values_of_a_query_are_escaped() -> None:
    choice = choice_of("nvme_path=/<script>alert(1)</script>%22'")
    page = PageChoice(choice, choice)
    answer = Answer(choice, costs_of(choice), Outcome(state="searching"))
    assert "<script>alert" not in render_page(page, answer, None, answer)
    error = ChoiceError("model: '<script>' is not allowed", "model")
    assert "<script>'" not in render_page(PageChoice(Choice()), None, error)
    own = (
        "family: vit\ndim: 96\ndepth: 2\nheads: 3\nimage: 64\npatch: 16\nclasses: 10\nname: </textarea><script>alert(2)"
    )
    pasted = Choice(model_yaml=own)
    shown = Answer(pasted, costs_of(pasted), Outcome.model_validate_json(search_choice(pasted).outcome))
    html = render_page(PageChoice(pasted, pasted), shown, None, shown)
    assert "<script>alert" not in html
    assert "&lt;/textarea&gt;&lt;script&gt;alert(2)" in html


def test_a_page_holds_two_choices_and_restores_them() -> None:
    for a, b in ((Choice(), choice_of(SAME[1])), (choice_of(SAME[4]), Choice(price=2.5))):
        page = PageChoice(b, a, 4)
        assert parse_page(parse_qsl(page_query(b, a, 4))) == page
    with pytest.raises(ChoiceError, match=r"^compare: heads: 'x' is not allowed"):
        parse_page([("compare", "heads=x")])
    with pytest.raises(ChoiceError, match="compare: is given twice"):
        parse_page([("compare", "gpus=2"), ("compare", "gpus=2")])
    assert parse_page([("front_nodes", "9" * 99)]) == PageChoice(Choice())


def test_a_point_of_the_trade_off_is_a_choice_with_the_same_front() -> None:
    page = PageChoice(choice_of("model=vit-base/32&nodes=2&minimize=nodes&global_batch=128"))
    found = Outcome.model_validate_json(search_choice(page.choice).outcome).plan
    assert found is not None
    point = next(point for point in reversed(found.pareto) if point.nodes == 1)
    picked = point_choice(page, point)
    assert picked is not None
    again = PageChoice(choice_of(query_of(picked)), None, 2)
    assert free_choice(again) == page.choice
    plan = Outcome.model_validate_json(search_choice(again.choice).outcome).plan
    assert plan is not None and plan.time is not None
    assert plan.time.likely_s == pytest.approx(point.step_s)
    answer = Answer(again.choice, costs_of(again.choice), Outcome(state="found", plan=plan))
    html = render_answer(again, answer, None, found)
    assert html.count('class="point chosen"') == 1
    assert html.count('class="point') == len(found.pareto)
    # What another choice has in place of nodes cannot be picked.
    pasted = PageChoice(Choice(cluster_yaml="base: 2x8xH100"))
    assert point_choice(pasted, point) is None


def test_price_and_thousands_of_gpus() -> None:
    choice = choice_of("model=gpt-base/1024&nodes=1024&price=2.5&all_nodes=true")
    plan = Outcome.model_validate_json(search_choice(choice).outcome).plan
    assert plan is not None and plan.run is not None
    assert plan.ranks == 8192
    assert plan.run.price == pytest.approx(2.5 * plan.run.gpu_hours)


def test_a_size_of_relation_groups_can_be_given_and_is_shown() -> None:
    choice = choice_of("model=vit-small/32&gpus=8&relation_parallel=4")
    outcome = Outcome.model_validate_json(search_choice(choice).outcome)
    assert outcome.plan is not None and outcome.plan.relation_ranks == 4
    page = PageChoice(choice)
    html = render_answer(page, Answer(choice, costs_of(choice), outcome))
    assert "shared out among 4 GPUs, to which tokens travel" in html
    # The trade-off of the free search links to plans with their own size.
    free = Outcome.model_validate_json(search_choice(free_choice(page)).outcome).plan
    assert free is not None
    point = next(point for point in free.pareto if "relation parallelism" in point.strategy)
    picked = point_choice(page, point)
    assert picked is not None and picked.relation_parallel == point.settings["relation_parallel"]
    assert "--relation-parallel 4" in " ".join(choice_arguments(choice))
    with pytest.raises(ChoiceError, match="relation_parallel: 3 is not allowed: must divide the number of ranks 8"):
        search_input(choice_of("model=vit-small/32&gpus=8&relation_parallel=3"))
