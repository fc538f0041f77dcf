"""Parsing of untrusted JSON, and conversion to typed values with one-line errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, NotRequired, TypeVar, Union

from vitral.errors import UserError, short

T = TypeVar("T")
LARGEST = 1 << 63  # exclusive bound on the absolute value of integers
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
NAMES[type(None)] = "null"


class UnknownFieldError(UserError):
    """A field that this version of vitral does not have, such as one added by a later version."""


def parse_json(content: bytes | str) -> Any:
    """Returns the value of a JSON document.

    Raises:
        ValueError: if it is not JSON, is deeply nested, or repeats a key. (The json module would
            take the last value of a repeated key.)
    """
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("deep nesting") from None


def convert_json(kind: type[T], value: Any) -> T:
    """Converts a JSON value to a dataclass or a TypedDict.

    Fields may be int, float, bool, str, a Literal, a union, a tuple, a mapping from str, a
    dataclass, or a TypedDict. A number without a fractional part is also accepted as an integer,
    because JSON has a single number type.

    Raises:
        UnknownFieldError: if there is no such field; the message names it.
        UserError: if a value has the wrong type, the dataclass rejects it, or a field is missing;
            the message names the field.
    """
    return _convert(kind, value, "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    match value:
        case dict() if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
            return _convert_fields(kind, value, name)
        case dict() if origin is Mapping:
            items = value.items()
            return {key: _convert(args[1], each, _join(name, short(key))) for key, each in items}
        case list() if origin is tuple and (args[-1] is ... or len(args) == len(value)):
            kinds = args[:1] * len(value) if args[-1] is ... else args
            pairs = zip(kinds, value, strict=True)
            return tuple(_convert(each, inner, name) for each, inner in pairs)
    if origin in (Union, UnionType):
        for each in args:
            try:
                return _convert(each, value, name)
            except UserError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif isinstance(kind, type) and _is_simple(kind, value):
        try:
            return value if value is None else kind(value)
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{name or 'document'}: expected {_describe(kind)}, got {short(value)}")


def _convert_fields(kind: Any, value: dict[str, Any], name: str) -> Any:
    kinds, required = _fields(kind)
    for key in value:
        if key not in kinds:
            raise UnknownFieldError(f"{_join(name, short(key))}: no such field")
    if missing := sorted(required - value.keys()):
        raise UserError(f"{_join(name, missing[0])}: expected a value, got none")
    found = {key: _convert(kinds[key], inner, _join(name, key)) for key, inner in value.items()}
    try:
        return kind(**found)
    except UserError as error:
        raise UserError(_join(name, str(error))) from None


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Returns the fields of a dataclass or TypedDict with their types, and the required fields."""
    kinds = typing.get_type_hints(kind)
    if not dataclasses.is_dataclass(kind):
        # __required_keys__ is wrong where annotations are not evaluated.
        marked = typing.get_type_hints(kind, include_extras=True)
        optional = {name for name in marked if typing.get_origin(marked[name]) is NotRequired}
        return kinds, frozenset(kinds.keys() - optional)
    needed = dataclasses.MISSING
    return kinds, frozenset(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is needed
    )


def _is_simple(kind: type, value: Any) -> bool:
    """Returns whether a JSON value matches a number type, str, bool or None."""
    if issubclass(kind, float):
        return type(value) in (int, float)
    if kind is int:
        integral = type(value) is int or (type(value) is float and value.is_integer())
        return integral and abs(value) < LARGEST
    if kind is str:
        return type(value) is str and _is_text(value)
    return type(value) is kind


def _is_text(value: str) -> bool:
    """Returns whether the text can be a path: it contains no NUL and no unencodable surrogate."""
    try:
        return "\0" not in value and os.fsencode(value) is not None
    except UnicodeEncodeError:
        return False


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, args))
    if origin is tuple:
        return "a list" if args[-1] is ... else f"a list of {len(args)}"
    if isinstance(kind, type) and issubclass(kind, float):
        kind = float
    return NAMES.get(kind, "an object")
