"""Finding one's way in rendered manifests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

OVERLAYS = ("base", "overlays/laptop", "overlays/gpu", "overlays/production")
Manifest = dict[str, Any]


def one(manifests: list[Manifest], kind: str, name: str = "understudy") -> Manifest:
    """The only document of that kind and name."""
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template with a name for it: of Ray's groups, and of StatefulSets."""
    for manifest in manifests:
        if manifest["kind"] == "RayService":
            cluster = manifest["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
        elif manifest["kind"] == "StatefulSet":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]


def serve_config(manifests: list[Manifest]) -> Manifest:
    """The text that the application is started from."""
    config: Manifest = yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])
    return config
