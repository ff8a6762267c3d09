"""Files of a single result: a comparison as a table or picture, an experiment as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from translution.distributed.experiments import ExperimentResult
from translution.planner import Comparison, ModelSpec
from translution.planner.analysis import scale_points
from translution.planner.common import InputError, check_new_file, check_new_folder, new_folder, write_bytes
from translution.planner.config import parse_training

from .render.vega import png, svg
from .sections.comparison import comparison_frame, comparison_markdown, comparison_picture
from .sections.experiment import experiment_markdown, experiment_picture
from .sections.traffic import add_traffic, traffic_markdown

COMPARISON_SUFFIXES = (".md", ".csv", ".json", ".png", ".svg")
EXPERIMENT_FILE, EXPERIMENT_TABLE, EXPERIMENT_PICTURE = "result.json", "README.md", "figure"


def check_comparison_files(paths: Sequence[Path], models: Sequence[ModelSpec], *, force: bool = False) -> None:
    """Check that a comparison can be written, before minutes are spent on it.

    Args:
        paths: files to write, as in `write_comparison`.
        models: the compared models.
        force: accept existing files, which are then replaced.

    Raises:
        InputError: for another suffix, a file that is named twice, a picture of several models, an absent folder, or a
            file that exists although ``force`` is false.
    """
    for number, path in enumerate(paths):
        if path.suffix not in COMPARISON_SUFFIXES:
            allowed = ", ".join(COMPARISON_SUFFIXES)
            raise InputError(f"out: {str(path)!r} is not allowed: must end in {allowed}")
        if path.absolute() in [other.absolute() for other in paths[:number]]:
            raise InputError(f"out: {str(path)!r} is not allowed twice")
        if path.suffix in (".png", ".svg") and len(models) != 1:
            raise InputError(f"out: {str(path)!r} is not allowed: a picture shows one model, not {len(models)}")
        check_new_file(path, "out", force=force)


def write_comparison(
    comparison: Comparison, models: Sequence[ModelSpec], paths: Sequence[Path], *, force: bool = False
) -> None:
    """Write a comparison in the format of each path's suffix: all files, or none if one may not be written.

    Args:
        comparison: the comparison.
        models: the compared models.
        paths: files to write: .md, .csv or .json with the table, .png or .svg with a picture of memory against size.
        force: replace existing files.

    Raises:
        InputError: as `check_comparison_files` does, and if a file cannot be written.
    """
    check_comparison_files(paths, models, force=force)
    contents = {path: _comparison_file(comparison, models, path.suffix) for path in paths}
    for path, content in contents.items():
        write_bytes(path, content)


def _comparison_file(comparison: Comparison, models: Sequence[ModelSpec], suffix: str) -> bytes:
    if suffix == ".md":
        text = comparison_markdown(comparison.rows, comparison.thresholds)
        return (text + traffic_markdown(comparison.traffic)).encode()
    if suffix == ".csv":
        return comparison_frame(comparison.rows).to_csv(index=False).encode()
    if suffix == ".json":
        return (comparison_frame(comparison.rows).to_json(orient="records", indent=2) + "\n").encode()
    training = parse_training({"precision": comparison.precision, "data": "synthetic"}, "compare")
    points = list(scale_points(models[0], training))
    memory = comparison_picture(points, comparison.thresholds, f"{models[0].name}: memory over all ranks")
    picture = add_traffic(memory, models[0])
    return png(picture) if suffix == ".png" else svg(picture).encode()


def check_experiment_folder(folder: Path, *, force: bool) -> None:
    """Check that the result can be written, before minutes are spent on the experiment.

    Raises:
        InputError: if the folder exists and ``force`` is false, or holds something else.
    """
    check_new_folder(folder, marker=EXPERIMENT_FILE, force=force)


def write_experiment(result: ExperimentResult, folder: Path, *, force: bool) -> None:
    """Write the raw figures, the table and the picture of an experiment: all of them, or nothing.

    Raises:
        InputError: as `check_experiment_folder` does, and if the folder cannot be written.
    """
    with new_folder(folder, marker=EXPERIMENT_FILE, force=force) as new:
        (new / EXPERIMENT_FILE).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        text = f"{experiment_markdown(result)}\n![{result.experiment.question}]({EXPERIMENT_PICTURE}.svg)\n"
        (new / EXPERIMENT_TABLE).write_text(text, encoding="utf-8")
        picture = experiment_picture(result)
        (new / f"{EXPERIMENT_PICTURE}.svg").write_text(svg(picture), encoding="utf-8")
        (new / f"{EXPERIMENT_PICTURE}.png").write_bytes(png(picture))
