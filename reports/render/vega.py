"""Rendering of Vega-Lite charts: PNG and SVG without a browser, and the JavaScript that draws them in a page.

Charts do not set the colours of text, axes and background: each output format adds its own.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import altair as alt
import vl_convert

COLOURS = ("#3c54d8", "#f09c3c", "#84c090", "#d884fc", "#90003c", "#24d8e4", "#a88448", "#6c489c", "#6c4800")
"""Chart colours, distinguishable from each other and from the grey with any colour vision, on white and near-black.

Source: our own search for the largest minimum difference; `tests/reports/charts/test_memory_timeline.py` checks it.
"""
REST_COLOUR = "#8a8f98"
"""Grey of the summed-up remainder."""
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


class ChartRows(alt.InlineData):
    """Rows that all parts of a chart share. Altair would copy each value again and again as it puts parts together."""

    def __deepcopy__(self, memo: object = None) -> ChartRows:
        return self


def config(ink: str, faint: str, page: str, legend_columns: int) -> dict[str, Any]:
    """Return the Vega-Lite configuration for an output format.

    Args:
        ink: colour of text and rules.
        faint: colour of grid lines.
        page: colour of the background.
        legend_columns: columns of a legend below a picture.
    """
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "font": FONT,
        "background": page,
        "view": {"stroke": None},
        "axis": text | {"gridColor": faint, "domainColor": faint, "tickColor": faint, "titleFontWeight": "normal"},
        "legend": text | {"titleFontWeight": "normal", "labelLimit": 0, "titleLimit": 0, "columns": legend_columns},
        "title": {"color": ink, "subtitleColor": ink, "fontSize": 15, "subtitleFontSize": 12, "anchor": "start"},
        "header": {"labelColor": ink, "titleColor": ink},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": ink},
        "point": {"color": ink},
        "area": {"stroke": page, "strokeWidth": 0.3},
    }


_PAPER = config("#1b1f24", "#d0d7de", "#ffffff", legend_columns=4)


def _version() -> str:
    return ".".join(alt.SCHEMA_VERSION.split(".")[:2])


def png(spec: dict[str, Any], scale: float = 2.0) -> bytes:
    """Return the picture on a white background as PNG."""
    picture: bytes = vl_convert.svg_to_png(svg(spec), scale=scale)
    return picture


def svg(spec: dict[str, Any]) -> str:
    """Return the picture on a white background as SVG."""
    return _svg(json.dumps(spec))


@lru_cache(maxsize=64)
def _svg(spec: str) -> str:
    """Compute a picture once for the page, the Markdown and the check of its files."""
    picture: str = vl_convert.vegalite_to_svg(spec, vl_version=_version(), config=_PAPER)
    return picture


@lru_cache(maxsize=1)
def javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as a script for a page; it sets ``window.vegaEmbed``."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_version())
    return bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--")
