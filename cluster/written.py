"""Values as people write them in flags and files: sizes, numbers of replicas, and YAML without its surprises."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import yaml
from pydantic import BeforeValidator

MOST_REPLICAS = 1000
_WAY_OUT = f"write N, or MIN:MAX with MIN from 0 and MAX up to {MOST_REPLICAS}"

_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12}
_UNITS |= {"tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(value: object) -> object:
    """Bytes of `4GiB`, `512 MB` or `1048576`; anything that is not text is passed on as it is.

    Raises ValueError naming the way to write it.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ValueError("is not a size; write bytes or a unit, such as 4GiB, 512MiB or 1048576")
    return int(float(match.group(1)) * unit) if "." in match.group(1) else int(match.group(1)) * unit


class Bounds(NamedTuple):
    """How many replicas a model has: at least and at most. Where they differ, demand decides."""

    least: int
    most: int

    @property
    def fixed(self) -> bool:
        return self.least == self.most

    @property
    def first(self) -> int:
        """How many it begins with: one at least, so that a checkpoint that cannot be loaded shows at once."""
        return max(self.least, 1)

    def __str__(self) -> str:
        return str(self.most) if self.fixed else f"{self.least}:{self.most}"


def parse_bounds(value: object) -> Bounds:
    """`4`, `1:4` or `0:4`. Raises ValueError naming the way to write it."""
    if isinstance(value, Bounds):
        return value
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?::\s*(\d{1,9})\s*)?", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"is not a number of replicas; {_WAY_OUT}")
    least = int(match.group(1))
    most = least if match.group(2) is None else int(match.group(2))
    if not 1 <= most <= MOST_REPLICAS or least > most:
        raise ValueError(f"is out of bounds; {_WAY_OUT}")
    return Bounds(least, most)


Replicas = Annotated[Bounds, BeforeValidator(parse_bounds)]


class Loader(yaml.SafeLoader):
    """Reads YAML, but takes `1:4` for a text: YAML 1.1 takes it for 64, a number in base 60."""


_INTEGER = re.compile(r"[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
Loader.yaml_implicit_resolvers = {
    first: [(tag, _INTEGER if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
