"""Typed access to the keys of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from understudy.errors import CheckpointError

T = TypeVar("T")


class Keys:
    """The keys of one object; every error names the file, the key and the value.

    `names` are what this family calls a key that others call otherwise; where the file has only the common name, as
    configurations saved by some versions do, that is read.
    """

    def __init__(
        self, data: Mapping[str, Any], path: str, architecture: str = "", names: Mapping[str, str] | None = None
    ) -> None:
        self.data, self.path, self.architecture = data, path, architecture
        self._names = dict(names or {})

    def called(self, **names: str) -> Keys:
        """The same keys, some of them under this family's names."""
        return Keys(self.data, self.path, self.architecture, names)

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def name(self, key: str) -> str:
        """What the file calls `key`."""
        own = self._names.get(key, key)
        return own if own in self.data or key not in self.data else key

    def __contains__(self, key: str) -> bool:
        """Whether the key is there, null or not."""
        return self.name(key) in self.data

    def raw(self, key: str) -> Any:
        return self.data.get(self.name(key))

    def need(self, key: str, kind: type[T]) -> T:
        if self.raw(key) is None:
            raise self.fail(f"{self.name(key)} is missing")
        return self._typed(key, self.raw(key), kind)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The default stands in for an absent key and for null."""
        value = self.raw(key)
        return default if value is None else self._typed(key, value, kind)

    def maybe(self, key: str, kind: type[T]) -> T | None:
        value = self.raw(key)
        return None if value is None else self._typed(key, value, kind)

    def size(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if not 1 <= value <= most:
            raise self.fail(f"{self.name(key)} is {value}, must be within 1 and {most}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.get(key, float, default)
        if value <= 0:
            raise self.fail(f"{self.name(key)} is {value}, must be above 0")
        return value

    def layers(self) -> int:
        return self.size("num_hidden_layers", most=10_000)

    def word(self, key: str, known: Mapping[str, T], default: str) -> T:
        """What the value means, one of the known."""
        value = self.get(key, str, default)
        if value not in known:
            raise self.fail(f"{self.name(key)} is {value!r}; known is {', '.join(known)}")
        return known[value]

    def only(self, key: str, value: Any) -> None:
        """Refuses any other value than the one that is known; an absent key means it."""
        if self.raw(key) not in (None, value):
            raise self.fail(f"{self.name(key)} is {self.raw(key)!r}; known is {value!r}")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        values = self.need(key, list)
        if len(values) != count:
            raise self.fail(f"{self.name(key)} has {len(values)} values, must have {count}: one per rotated pair")
        numbers = tuple(self._typed(key, value, float) for value in values)
        if min(numbers) <= 0:
            raise self.fail(f"{self.name(key)} has {min(numbers)}, must be above 0")
        return numbers

    def _typed(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"{self.name(key)} is {value!r}, must be of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fail(f"{self.name(key)} is {value}, must be finite")
        return value
