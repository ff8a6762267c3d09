"""What a search found next to its plan: the next best strategy, and the reasons in the folder's README."""

from __future__ import annotations

from pathlib import Path

import pytest

from translution import planner
from translution.planner.common.errors import InputError
from translution.planner.search.explanation import next_best, search_notes, write_search_folder
from translution.planner.search.plan_search import plan


@pytest.fixture(scope="module")
def result() -> planner.SearchResult:
    return plan("vit-small/16", "8xH100", precision="bf16")


def test_the_next_best_is_the_fastest_of_the_others_that_fit(result: planner.SearchResult) -> None:
    other = next_best(result)
    assert other is not None
    assert not other.chosen
    times = [verdict.seconds for verdict in result.strategies if verdict.seconds is not None and not verdict.chosen]
    assert other.seconds == min(times)


def test_without_another_strategy_there_is_no_next_best() -> None:
    assert next_best(plan("vit-tiny/56", "8xH100", stage=3, offload="none")) is None


def test_the_readme_of_the_folder_has_every_reason(result: planner.SearchResult, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    write_search_folder(result, folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.endswith(search_notes(result))
    for verdict in result.strategies:
        assert verdict.reason in text
    for knob in result.knobs:
        assert f"| {knob.knob} | {knob.value} | {knob.reason} |" in text
    assert text.count(f"| {result.pareto[0].strategy} |") >= 1
    assert f"{result.considered:,} candidates" in text
    with pytest.raises(InputError, match="exists already"):
        write_search_folder(result, folder)
    write_search_folder(result, folder, force=True)


def test_a_search_and_a_comparison_tell_how_far_they_are() -> None:
    for call, last in (
        (lambda show: plan("vit-tiny/56", "2x8xH100", on_progress=show), None),
        (lambda show: planner.compare(["vit-tiny/56"], alpha_ranks=[8], on_progress=show), 1.0),
    ):
        seen: list[tuple[int, int]] = []
        call(lambda done, total, seen=seen: seen.append((done, total)))
        done, (total,) = [number for number, _ in seen], {number for _, number in seen}
        assert done == sorted(done)
        assert len(done) > 5
        assert done[-1] / total == (last if last is not None else pytest.approx(1, abs=0.2))
