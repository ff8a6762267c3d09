"""A report as one self-contained HTML page that makes no network requests."""

from __future__ import annotations

import base64
import hashlib
import io
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from . import vega
from .document import TEXT_KINDS, Document, format_value, sort_value

_LIVE = vega.config("currentColor", "var(--line)", "var(--page)", legend_columns=4)
"""Chart colours taken from the page, so that charts follow its dark or light theme."""
_SCALE = 1.5
"""Pixels of a static image per CSS pixel."""
_CONTENTS = 3
"""Minimum number of sections for a table of contents."""


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
    """Return the source expression that allows this script, and no other, in the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _static_images(document: Document) -> dict[str, tuple[str, int]]:
    """Return the PNG (base64) of every picture and its width in CSS pixels, by the picture's key."""
    images = {}
    for picture in document.pictures:
        with Image.open(io.BytesIO(vega.png(picture.spec, scale=_SCALE))) as image:
            images[picture.key] = base64.b64encode(_reduce_colours(image)).decode(), round(image.width / _SCALE)
    return images


def _reduce_colours(image: Image.Image) -> bytes:
    """Return the image as a PNG with at most 256 colours, which is about a tenth of the size."""
    out = io.BytesIO()
    reduced = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    reduced.save(out, "PNG", optimize=True)
    return out.getvalue()


def _live(spec: dict[str, Any]) -> bool:
    """True if the chart can be scaled to the page's width; composed charts have fixed widths."""
    return not {"hconcat", "vconcat", "concat", "facet"} & set(spec)


def render_html(document: Document) -> str:
    """Return the page of a document."""
    scripts = [vega.javascript(), _read("report.js")]
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_source, scripts))}"
    )
    template = _environment().get_template("report.html.j2")
    return template.render(
        document=document,
        contents=len(document.sections) >= _CONTENTS,
        images=_static_images(document),
        live=_live,
        config=_LIVE,
        style=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=policy,
    )
