"""Charts of what training runs recorded at each step, with several runs in one chart and what was predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from ..inputs.training_runs import TrainingRun
from ..render.vega import COLOURS, ChartRows
from .memory_timeline import CHART_WIDTH

_MAX_POINTS = 1000
_HALF_WIDTH, _HEIGHT, _HALF_HEIGHT = 440, 260, 200
_LOG_RATIO = 10.0
"""Values that differ by more than this factor are drawn on a logarithmic axis, if the chart may."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure of a step that is drawn against the steps."""

    column: str
    """Column of the steps."""
    title: str
    unit: str = ""
    digits: str = ".4g"
    """Format of a value in the tooltip."""
    logarithmic: bool = False
    """Whether widely different values are drawn on a logarithmic axis."""
    half: bool = True
    """Whether the chart is half as wide as the page."""

    @property
    def axis_title(self) -> str:
        """Title of the vertical axis."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True, slots=True)
class Expected:
    """What was predicted of a figure of a run: the likely value and the ends of its interval."""

    run: str
    likely: float
    low: float
    high: float


def _points(run: TrainingRun, column: str) -> list[dict[str, Any]]:
    """Return the recorded values of a column: all, or at most 1000 evenly spaced ones that include the last."""
    known = run.steps.dropna(subset=[column])
    stride = max(1, -(-len(known) // _MAX_POINTS))
    kept = known.iloc[::-1].iloc[::stride].iloc[::-1]
    return [
        {"run": run.label, "step": int(step), "y": float(value)}
        for step, value in zip(kept["step"], kept[column], strict=True)
    ]


def _evaluations(run: TrainingRun) -> list[dict[str, Any]]:
    """Return the losses on held-out samples."""
    known = run.evaluations.dropna(subset=["loss"])
    return [
        {"run": run.label, "step": int(row["step"]), "y": row["loss"]}
        | ({"accuracy": f"{row['accuracy']:.2%}"} if not math.isnan(row["accuracy"]) else {})
        for row in known.to_dict("records")
    ]


def _describe(rows: Sequence[dict[str, Any]], figure: Curve, expected: Iterable[Expected]) -> str:
    frame = pd.DataFrame(rows)
    parts = []
    for name, own in frame.groupby("run", sort=False):
        first, last = own.iloc[0], own.iloc[-1]
        ends = f"{first['y']:{figure.digits}} at step {first['step']}, {last['y']:{figure.digits}} at step"
        parts.append(f"{name}: {figure.title} {ends} {last['step']}")
    parts += [f"{each.run}: predicted {each.likely:{figure.digits}}" for each in expected]
    return f"{figure.title[0].upper()}{figure.title[1:]} of each step. {'; '.join(parts)}."


def _expected_layers(expected: Sequence[Expected], title: str, scale: alt.Scale) -> list[alt.Chart]:
    """Return the predicted interval as a band over all steps, and the likely value as a dashed rule."""
    if not expected:
        return []
    rows = [{"run": each.run, "y": each.likely, "low": each.low, "high": each.high} for each in expected]
    base = alt.Chart(ChartRows(values=rows))
    tooltip = [alt.Tooltip("run:N"), alt.Tooltip("y:Q", title="predicted", format=".4g")]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".4g") for name in ("low", "high")]
    y, low = (alt.Y(f"{name}:Q", scale=scale, title=title) for name in ("y", "low"))
    return [
        base.mark_rect(opacity=0.12, strokeWidth=0).encode(y=low, y2="high:Q", color="run:N", tooltip=tooltip),
        base.mark_rule(strokeDash=[6, 4], strokeWidth=2).encode(y=y, color="run:N", tooltip=tooltip),
    ]


def draw_figure(
    runs: Sequence[TrainingRun], figure: Curve, expected: Sequence[Expected] = (), *, evaluated: bool = False
) -> dict[str, Any] | None:
    """Draw a figure of every step, with a line for each run.

    Args:
        runs: the runs.
        figure: what is drawn.
        expected: what was predicted of it, by run.
        evaluated: draw the losses on held-out samples as diamonds.

    Returns:
        Vega-Lite specification; None if no run recorded the figure.
    """
    rows = [row for run in runs for row in _points(run, figure.column)]
    if not rows:
        return None
    labels = [run.label for run in runs]
    values = [row["y"] for row in rows] + [end for each in expected for end in (each.low, each.high)]
    wide = figure.logarithmic and min(values) > 0 and max(values) > _LOG_RATIO * min(values)
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=True)
    y = alt.Y("y:Q", title=figure.axis_title, scale=scale)
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1, format="d"))
    legend = alt.Legend(orient="bottom", symbolOpacity=1) if len(labels) > 1 else None
    colour = alt.Color(
        "run:N", title=None, scale=alt.Scale(domain=labels, range=list(COLOURS[: len(labels)])), legend=legend
    )
    base = alt.Chart(ChartRows(values=rows)).encode(x=x, y=y, color=colour)
    hovered = alt.selection_point(name="hover", on="pointerover", clear="pointerout", nearest=True, empty=False)
    tooltip = [alt.Tooltip("run:N"), alt.Tooltip("step:Q", format="d")]
    tooltip.append(alt.Tooltip("y:Q", title=figure.axis_title, format=figure.digits))
    shown = alt.condition(hovered, alt.value(1.0), alt.value(0.0 if len(rows) > len(runs) else 1.0))
    points = base.mark_point(filled=True, size=60, aria=False).encode(tooltip=tooltip, opacity=shown)
    layers = [*_expected_layers(expected, figure.axis_title, scale), base.mark_line(), points.add_params(hovered)]
    held_out = [row for run in runs for row in _evaluations(run)] if evaluated else []
    if held_out:
        marks = alt.Chart(ChartRows(values=held_out)).mark_point(shape="diamond", filled=True, size=110, opacity=1)
        accuracy = [alt.Tooltip("accuracy:N")] if any("accuracy" in row for row in held_out) else []
        marks = marks.encode(x=x, y=y, color=colour, tooltip=[*tooltip, *accuracy])
        layers.append(marks)
    size = (_HALF_WIDTH, _HALF_HEIGHT) if figure.half else (CHART_WIDTH, _HEIGHT)
    chart = alt.LayerChart(
        layer=layers,
        width=size[0],
        height=size[1],
        title=f"{figure.title[0].upper()}{figure.title[1:]}",
        description=_describe(rows, figure, expected),
    )
    return dict(chart.to_dict())
