"""Conversion of JSON to typed values, and errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import pytest

from vitral.config import Seconds
from vitral.documents import convert_json, parse_json
from vitral.errors import UserError


@dataclass(frozen=True)
class Part:
    kind: Literal["round", "square"]
    size: int | None = None

    def __post_init__(self):
        if self.size == 13:
            raise UserError("size: expected another, got 13")


class Thing(TypedDict):
    parts: tuple[Part, ...]
    pair: tuple[int, float]
    fractions: Mapping[str, float]
    limit: NotRequired[Seconds | None]
    mode: NotRequired[int | Literal["all"]]
    on: NotRequired[bool]
    name: NotRequired[str]


SMALL = {"parts": [], "pair": [1, 2.5], "fractions": {}}
LARGE = {
    "parts": [{"kind": "round", "size": 3.0}, {"kind": "square"}],
    "pair": [-3, 4],
    "fractions": {"a": 1, "b": 0.5},
    "limit": 90,
    "mode": "all",
    "on": True,
    "name": "café \udcff",
}


def test_values_are_converted_to_their_types():
    assert convert_json(Thing, SMALL) == {"parts": (), "pair": (1, 2.5), "fractions": {}}
    found = convert_json(Thing, LARGE)
    assert found["parts"] == (Part("round", 3), Part("square"))
    assert [type(found["pair"][1]), type(found["fractions"]["a"])] == [float, float]
    assert type(found["parts"][0].size) is int
    assert type(found["limit"]) is Seconds
    assert convert_json(Thing, {**SMALL, "limit": None, "mode": 5})["mode"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": None}, "parts: expected a list, got None"),
        ({"parts": [{"size": 1}]}, "parts.kind: expected a value, got none"),
        ({"parts": [{"kind": "oval"}]}, "parts.kind: expected one of round, square, got 'oval'"),
        ({"parts": [{"kind": ["round"]}]}, "parts.kind: expected one of .*, got \\['round'\\]"),
        ({"parts": [{"kind": "round", "size": 13}]}, "parts.size: expected another, got 13"),
        ({"parts": [{"kind": "round", "size": True}]}, "parts.size: .*integer or null, got True"),
        ({"parts": [[]]}, "parts: expected an object, got \\[\\]"),
        ({"pair": [1]}, "pair: expected a list of 2, got \\[1\\]"),
        ({"pair": [1.5, 1]}, "pair: expected an integer, got 1.5"),
        ({"pair": [float("nan"), 1]}, "pair: expected an integer, got nan"),
        ({"pair": [2**63, 1]}, "pair: expected an integer, got 9223372036854775808"),
        ({"pair": [1, 10**400]}, "pair: expected a number, got 1000"),
        ({"fractions": {"a": "1"}}, "fractions.'a': expected a number, got '1'"),
        ({"fractions": []}, "fractions: expected an object, got \\[\\]"),
        ({"limit": -1}, "limit: expected a number or null, got -1"),
        ({"mode": "some"}, "mode: expected an integer or one of all, got 'some'"),
        ({"on": 1}, "on: expected true or false, got 1"),
        ({"name": "a\0b"}, "name: expected text, got 'a.x00b'"),
        ({"name": "\ud800"}, "name: expected text, got '.ud800'"),
        ({"more": 1}, "'more': no such field"),
        ({"name": ["x" * 10_000] * 10_000}, "name: expected text, got \\['xx.{1,600}$"),
    ],
)
def test_invalid_values_are_rejected_by_name(change, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        convert_json(Thing, {**SMALL, **change})
    assert str(error.value).isprintable()


def test_a_document_must_be_an_object():
    for value in (None, [], "text", 3):
        with pytest.raises(UserError, match=r"^document: expected an object, got"):
            convert_json(Thing, value)
    with pytest.raises(UserError, match=r"^fractions: expected a value, got none"):
        convert_json(Thing, {})


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, '{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]', "{", ""]
)
def test_invalid_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"deep nesting|duplicate key|Expecting"):
        parse_json(text)
    assert parse_json('{"a": {"a": [1, null]}}') == {"a": {"a": [1, None]}}
