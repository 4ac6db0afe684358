"""The models that a gateway answers for: by name, and of each the versions that replicas have while an upgrade rolls.

A request belongs to one version from its first check to its last token: it is encoded with that version's tokenizer,
goes to replicas with its fingerprint alone, and its answer is decoded by it. New requests are spread over the versions
as replicas are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Set

from router.bounds import show
from router.models import ServedModel
from understudy.errors import InvalidRequest, ModelNotFound

Version = tuple[str, str]  # a model's name and fingerprint
_Known = dict[str, tuple[int, ServedModel]]  # by fingerprint: order, and what it is


class Models:
    """`put` adds versions, `weigh` says how many replicas each has; `expect` which names there should be, even where no
    version is known yet."""

    def __init__(self, models: Iterable[ServedModel] = (), rng: random.Random | None = None) -> None:
        self._models: dict[str, _Known] = {}
        self._ready: Mapping[Version, int] = {}
        self._expected: Set[str] = frozenset()
        self._rng = rng if rng is not None else random.Random()
        for model in models:
            self.put(model)

    def put(self, model: ServedModel, order: int = 0) -> None:
        """Adds a version, or replaces that with its fingerprint. The larger `order` is the newer version."""
        self._models.setdefault(model.name, {})[model.info.model_fingerprint] = (order, model)

    def expect(self, names: Set[str]) -> None:
        """The names that there should be from now on. Models of other names are forgotten."""
        self._expected = frozenset(names)
        self._models = {name: known for name, known in self._models.items() if name in names}

    def keep(self, name: str, fingerprints: Set[str]) -> None:
        """Forgets other versions of a model, but never the newest."""
        known = self._models.get(name)
        if known:
            newest = self._newest(known)
            self._models[name] = {f: v for f, v in known.items() if f in fingerprints or v[1] is newest}

    def weigh(self, ready: Mapping[Version, int]) -> None:
        """How many ready replicas each version has."""
        self._ready = ready

    def has(self, name: str, fingerprint: str) -> bool:
        return fingerprint in self._models.get(name, {})

    def all(self) -> list[ServedModel]:
        """One version of each: the newest that has replicas, else the newest."""
        return [self._current(known) for known in self._models.values() if known]

    def missing(self, name: str) -> bool:
        """Whether the model that is meant should be there, and no version of it is known yet: its first replica will
        tell."""
        if name:
            return name in self._expected and name not in self._models
        return len(self._expected) == 1 and not self._models

    @property
    def expected_one(self) -> str:
        """The name that an empty one means; empty where it means none."""
        return next(iter(self._expected)) if len(self._expected) == 1 else ""

    def find(self, name: str, fingerprint: str = "") -> ServedModel:
        """A version for a request to that name; the only model's where the name is empty. `fingerprint`: of a stream
        that goes on. Raises ModelNotFound, InvalidRequest."""
        known = self._models.get(name) if name else None
        if name and not known:
            raise ModelNotFound(f"no model named {show(name)} is served; ListModels names those that are")
        if not known:
            if not self._models:
                raise ModelNotFound("no model is served yet; try again shortly")
            number = max(len(self._models), len(self._expected))
            if number > 1:
                raise InvalidRequest(f"is empty; {number} models are served, name one of ListModels", "model")
            known = next(iter(self._models.values()))
        if fingerprint in known:
            return known[fingerprint][1]
        versions = [model for _, model in known.values()]
        weights = [self._weight(model) for model in versions]
        if len(versions) == 1 or not any(weights):
            return self._newest(known)
        return self._rng.choices(versions, weights)[0]

    def superseded(self, name: str, fingerprint: str) -> bool:
        """Whether this version has no replica any more, and another one of the model has."""
        known = self._models.get(name, {})
        ready = {f for f, (_, model) in known.items() if self._weight(model)}
        return bool(ready) and fingerprint not in ready

    def _weight(self, model: ServedModel) -> int:
        return self._ready.get((model.name, model.info.model_fingerprint), 0)

    def _current(self, known: _Known) -> ServedModel:
        ready = {f: v for f, v in known.items() if self._weight(v[1])}
        return self._newest(ready or known)

    @staticmethod
    def _newest(known: _Known) -> ServedModel:
        return max(reversed(known.values()), key=lambda v: v[0])[1]  # of equal ones that which came last
