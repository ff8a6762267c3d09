"""The base class of all inputs and artifacts, and the conversion of a validation error to one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from .errors import InputError, nearest
from .files import read_json
from .types import printable

_T = TypeVar("_T")
_WORDS = {list: "list", str: "text", int: "number", float: "number", bool: "truth value"}
"""Words for what a file holds in place of keys and values."""


class Schema(BaseModel):
    """Frozen pydantic model that rejects unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        defer_build=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


def build_schemas() -> None:
    """Build what pydantic builds when a schema is first used, for all that are defined.

    Two threads that first use a schema at the same time may get an error, or a model without fields (seen with pydantic
    2.11.0 and 2.13.0). A program that checks models in threads calls this before it starts them; it takes 25 ms.
    """
    for schema in _subschemas(Schema):
        schema.model_rebuild()


def _subschemas(schema: type[Schema]) -> Iterator[type[Schema]]:
    """Yield all classes that inherit from a schema."""
    for sub in schema.__subclasses__():
        yield sub
        yield from _subschemas(sub)


def stored_as(key: str, default: Any = PydanticUndefined) -> Any:
    """Declare a field that JSON and YAML store under a key other than the field's name; both are read.

    Args:
        key: the stored key, which older plans and scripts use.
        default: the value of a missing field; without a default the field is required.
    """
    return Field(default, validation_alias=key, serialization_alias=key)


def _describe(error: ErrorDetails, known_fields: tuple[str, ...]) -> str:
    field = ".".join(str(part) for part in error["loc"] if part not in ("vit", "gpt", "video"))
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        allowed = f"; allowed: {', '.join(known_fields)}" if known_fields else ""
        return f"unknown key {field!r}{nearest(name, known_fields)}{allowed}"
    if error["type"] == "missing":
        return f"{field}: is required"
    if error["type"] == "value_error":
        message = str(error.get("ctx", {}).get("error", error["msg"]))
        return f"{field}: {message}" if field else message
    message = error["msg"][0].lower() + error["msg"][1:]
    value = repr(error["input"])
    if len(value) > 60:
        value = value[:57] + "..."
    return f"{field or 'value'}: {value} is not allowed: {message}"


def validate(adapter: TypeAdapter[_T], data: object, what: str, known_fields: tuple[str, ...]) -> _T:
    """Validate ``data`` and convert pydantic's report to one line.

    Args:
        adapter: the type that the data must have.
        data: parsed JSON or YAML, or keyword values.
        what: name of the data, which begins the error line.
        known_fields: the allowed keys, listed when a key is unknown.

    Raises:
        InputError: with the first invalid field, its value and the allowed values.
    """
    if not isinstance(data, Mapping):
        found = "nothing" if data is None else f"a {_WORDS.get(type(data), type(data).__name__)}"
        raise InputError(f"{what}: holds {found}: must be keys and their values")
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # A mistyped key explains why the right one is missing.
        details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
        rest = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        text = f"{what}: {_describe(details[0], known_fields)}{rest}"
        raise InputError(printable(" ".join(text.split()))) from None


def parse_json(adapter: TypeAdapter[_T], text: str | bytes, what: str) -> _T:
    """Validate a JSON document that the toolkit wrote.

    Args:
        adapter, what: as in `validate`.
        text: the JSON document.

    Raises:
        InputError: as in `validate`, and as `read_json` does.
    """
    return validate(adapter, read_json(text, what), what, ())
