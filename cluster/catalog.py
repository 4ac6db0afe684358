"""What the router keeps for others: which models there are, the text files of each version, how many replicas were
decided. A plain class inside the router actor; when it is lost, those who know bring it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from cluster.autoscale import Decision
from cluster.written import Bounds
from workers.actors import ColdStart

_KEPT_VERSIONS = 4  # of a model


class Catalog(msgspec.Struct, frozen=True):
    """The models of a service and the bounds of their replicas. The larger `generation` is the newer."""

    generation: int = 0
    models: dict[str, tuple[int, int]] = {}

    def bounds(self) -> dict[str, Bounds]:
        return {name: Bounds(*pair) for name, pair in self.models.items()}


class Texts(msgspec.Struct, frozen=True):
    """The text files of a model's version, compressed, by name; and the generation of the plan that they came with."""

    generation: int
    files: dict[str, bytes]


class Known(msgspec.Struct, frozen=True):
    """What a gateway should know. `versions` are the generations of texts, by model and fingerprint; `starts` are how
    long replicas' starts took."""

    catalog: Catalog = Catalog()
    versions: dict[str, dict[str, int]] = {}
    decisions: dict[str, Decision] = {}
    starts: dict[str, ColdStart] = {}


class Library:
    """`clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._catalog = Catalog()
        self._texts: dict[str, dict[str, Texts]] = {}
        self._decisions: dict[str, Decision] = {}
        self._decided = clock()
        self._starts: dict[str, ColdStart] = {}

    def started(self, replica: str, start: ColdStart) -> None:
        """How long the start of a replica's present life took."""
        self._starts[replica] = start

    def left(self, replica: str) -> None:
        self._starts.pop(replica, None)

    def exchange(self, catalog: Catalog) -> Known:
        """Takes a newer catalog, and tells what is known."""
        if catalog.generation > self._catalog.generation:
            self._catalog = catalog
        versions = {m: {f: t.generation for f, t in texts.items()} for m, texts in self._texts.items()}
        age = self._clock() - self._decided
        decisions = {m: msgspec.structs.replace(d, age_s=d.age_s + age) for m, d in self._decisions.items()}
        return Known(self._catalog, versions, decisions, dict(self._starts))

    def has(self, model: str, fingerprint: str, generation: int) -> bool:
        """Whether these texts, or newer ones, are here."""
        texts = self._texts.get(model, {}).get(fingerprint)
        return texts is not None and texts.generation >= generation

    def lend(self, model: str, fingerprint: str, texts: Texts) -> None:
        """Keeps a version's texts, unless newer ones are here; of each model the newest few."""
        if self.has(model, fingerprint, texts.generation):
            return
        known = self._texts.setdefault(model, {})
        known[fingerprint] = texts
        while len(known) > _KEPT_VERSIONS:
            del known[min(known, key=lambda f: known[f].generation)]

    def texts(self, model: str, fingerprint: str) -> Texts | None:
        return self._texts.get(model, {}).get(fingerprint)

    def decide(self, decisions: Mapping[str, Decision]) -> None:
        """What the autoscaling has decided."""
        self._decisions = dict(decisions)
        self._decided = self._clock()
