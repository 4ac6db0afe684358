"""JSON Schemas without the keywords that say nothing where they stand, of which the library would refuse some."""

from __future__ import annotations

from typing import Any

_SCHEMA = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else")
_SCHEMAS = ("anyOf", "allOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def simplified(schema: Any) -> Any:
    """The same schema; what is no schema comes back as it is.

    Dropped: `uniqueItems` where it is false or there is at most one item, `if` without `then` and `else`, both without
    `if`, and `not` of false (JSON Schema 2020-12, validation 6.4.3, core 10.2).
    """
    if not isinstance(schema, dict):
        return schema
    out = {key: _inner(key, value) for key, value in schema.items()}
    most = out.get("maxItems")
    few = isinstance(most, int) and most <= 1
    if "uniqueItems" in out and (out["uniqueItems"] is False or (out["uniqueItems"] is True and few)):
        del out["uniqueItems"]
    if "if" not in out or not {"then", "else"} & out.keys():
        for key in ("if", "then", "else"):
            out.pop(key, None)
    if out.get("not") is False:
        del out["not"]
    return out


def _inner(key: str, value: Any) -> Any:
    if key in _SCHEMAS or (key == "items" and isinstance(value, list)):
        return [simplified(v) for v in value] if isinstance(value, list) else value
    if key in _SCHEMA:
        return simplified(value)
    if key in _NAMED and isinstance(value, dict):
        return {name: simplified(v) for name, v in value.items()}
    return value
