"""The chart of a run's training loss."""

from __future__ import annotations

import altair as alt
import pandas as pd

from ..render.vega import COLOURS
from .memory_timeline import CHART_WIDTH

_MAX_POINTS = 1000


def draw_curve(steps: pd.DataFrame, title: str) -> alt.LayerChart:
    """Draw the loss of every step, or of at most 1000 evenly spaced steps that include the last.

    Args:
        steps: rows of event "step" of a run's metrics; at least one.
        title: title of the chart.
    """
    stride = -(-len(steps) // _MAX_POINTS)
    table = steps[["step", "loss", "learning_rate", "samples_per_s"]].iloc[::-1].iloc[::stride].iloc[::-1]
    records = table.astype({"step": int}).to_dict("records")
    rows = [{str(name): value for name, value in record.items()} for record in records]
    loss = alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=True))
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(grid=False)), y=loss
    )
    hovered = alt.selection_point(name="hover", on="pointerover", clear="pointerout", nearest=True, empty=False)
    tooltip = [
        alt.Tooltip("step:Q"),
        alt.Tooltip("loss:Q", format=".4f"),
        alt.Tooltip("learning_rate:Q", title="learning rate", format=".3g"),
        alt.Tooltip("samples_per_s:Q", title="samples/s", format=",.0f"),
    ]
    shown = alt.condition(hovered, alt.value(1.0), alt.value(0.0))
    points = (
        base.mark_point(filled=True, size=60, aria=False).encode(tooltip=tooltip, opacity=shown).add_params(hovered)
    )
    first, last = rows[0], rows[-1]
    text = f"{title}: loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}."
    lines = [base.mark_line(color=COLOURS[0]), points]
    return alt.LayerChart(layer=lines, width=CHART_WIDTH, height=240, title=alt.TitleParams(title), description=text)
