"""A report as one HTML page that holds all it needs, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import io
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..render import vega
from .document import TEXT_KINDS, Document, format_value, sort_value

_LIVE = vega.config("currentColor", "var(--line)", "var(--page)", legend_columns=4)
"""The page's own colours, so that charts turn dark and light with it."""
_SCALE = 1.5
"""Dots of a still picture for each of the page's pixels."""
_CONTENTS = 5
"""Sections from which on a page has a list of them."""


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sort_value"] = sort_value
    environment.globals["format_value"] = format_value
    environment.globals["texts"] = TEXT_KINDS
    return environment


def _source(script: str) -> str:
    """What the page's policy calls a script that may run; nothing else in the page can."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _stills(document: Document) -> dict[str, tuple[str, int]]:
    """The PNG of every picture by its key, with its width in the page's pixels."""
    stills = {}
    for picture in document.pictures:
        with Image.open(io.BytesIO(vega.png(picture.spec, scale=_SCALE))) as still:
            stills[picture.key] = base64.b64encode(_smaller(still)).decode(), round(still.width / _SCALE)
    return stills


def _smaller(still: Image.Image) -> bytes:
    """A PNG of at most 256 colours: a tenth of the size, and what is of one colour keeps it."""
    out = io.BytesIO()
    few = still.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def _live(spec: dict[str, Any]) -> bool:
    """Whether a chart takes the width that it is given; several in one have their own."""
    return not {"hconcat", "vconcat", "concat", "facet"} & set(spec)


def render_html(document: Document) -> str:
    """The page.

    Args:
        document: its content.
    """
    scripts = [vega.javascript(), _read("report.js")]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_source, scripts))}"
    )
    template = _environment().get_template("report.html.j2")
    return template.render(
        document=document,
        contents=len(document.sections) >= _CONTENTS,
        stills=_stills(document),
        live=_live,
        config=_LIVE,
        style=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy,
    )
