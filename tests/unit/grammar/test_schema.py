"""Keywords that say nothing are dropped; what validators say of any value stays."""

from __future__ import annotations

import itertools
from typing import Any

import jsonschema
import pytest

from workers.grammar.schema import simplified

VALUES = [None, 1, "a", [], [1], [1, 1], [1, 2], ["a"], {}, {"if": 1}, {"uniqueItems": False}, {"a": [1, 1]}, {"a": 2}]
PARTS: list[dict[str, Any]] = [
    {"uniqueItems": False},
    {"uniqueItems": True, "maxItems": 1},
    {"if": {"type": "array"}},
    {"then": {"type": "string"}},
    {"else": {"uniqueItems": False}},
    {"not": False},
    {"properties": {"if": {"type": "integer"}, "a": {"uniqueItems": False}}},
    {"anyOf": [{"uniqueItems": False}, {"type": "string"}]},
    {"items": {"not": False, "type": "integer"}},
]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_simplified_schema_means_the_same(size: int) -> None:
    for parts in itertools.combinations(PARTS, size):
        schema = {k: v for part in parts for k, v in part.items()}
        before, after = (jsonschema.Draft202012Validator(s) for s in (schema, simplified(schema)))
        assert [before.is_valid(v) for v in VALUES] == [after.is_valid(v) for v in VALUES], schema


@pytest.mark.parametrize(
    ("schema", "simple"),
    [
        (True, True),
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        ({"items": {"uniqueItems": True, "maxItems": 1}}, {"items": {"maxItems": 1}}),
        ({"uniqueItems": True, "maxItems": 2}, {"uniqueItems": True, "maxItems": 2}),
        ({"$defs": {"x": {"if": {}, "type": "string"}}}, {"$defs": {"x": {"type": "string"}}}),
        ({"if": {}, "then": {"not": False}}, {"if": {}, "then": {}}),
        ({"properties": {"uniqueItems": {"const": False}}}, {"properties": {"uniqueItems": {"const": False}}}),
        ({"enum": [{"uniqueItems": False}]}, {"enum": [{"uniqueItems": False}]}),
        ({"not": {}}, {"not": {}}),
    ],
)
def test_what_is_dropped(schema: Any, simple: Any) -> None:
    assert simplified(schema) == simple
