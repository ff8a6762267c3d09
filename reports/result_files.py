"""Files of a single result: a comparison as a table or picture, an experiment as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from translution.distributed.experiments import ExperimentResult
from translution.planner import Comparison, ModelSpec
from translution.planner.analysis import scale_points
from translution.planner.common import InputError, check_new_folder, new_folder, write_bytes, write_text
from translution.planner.config import parse_training

from .render.vega import png, svg
from .sections.comparison import comparison_frame, comparison_markdown, comparison_picture
from .sections.experiment import experiment_markdown, experiment_picture

EXPERIMENT_FILE, EXPERIMENT_TABLE, EXPERIMENT_PICTURE = "result.json", "README.md", "figure"


def write_comparison(comparison: Comparison, models: Sequence[ModelSpec], path: Path) -> None:
    """Write a comparison in the format of the path's suffix.

    Args:
        comparison: the comparison.
        models: the compared models.
        path: file to write: .md, .csv or .json with the table, .png or .svg with a picture of memory against size.

    Raises:
        InputError: if a picture is requested for several models, or the file cannot be written.
    """
    if path.suffix == ".md":
        write_text(path, comparison_markdown(comparison.rows, comparison.thresholds))
    elif path.suffix == ".csv":
        write_text(path, comparison_frame(comparison.rows).to_csv(index=False))
    elif path.suffix == ".json":
        write_text(path, comparison_frame(comparison.rows).to_json(orient="records", indent=2) + "\n")
    else:
        if len(models) != 1:
            raise InputError(f"out: {str(path)!r} is not allowed: a picture shows one model, not {len(models)}")
        training = parse_training({"precision": comparison.precision, "data": "synthetic"}, "compare")
        points = list(scale_points(models[0], training))
        title = f"{models[0].name}: memory over all ranks"
        picture = comparison_picture(points, comparison.thresholds, title)
        write_bytes(path, png(picture)) if path.suffix == ".png" else write_text(path, svg(picture))


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
