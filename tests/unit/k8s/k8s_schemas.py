"""Documents against the schemas by which Kubernetes would take or refuse them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = ("1.31", "1.37")  # the oldest and the newest that the manifests are for
RAY_KINDS = ("RayCluster", "RayJob", "RayService")


def check_core(manifest: dict[str, Any], version: str) -> None:
    """A document of Kubernetes' own kinds. Raises ValueError; unknown fields are refused."""
    if wrong := _wrong(json.dumps(manifest), version):
        raise ValueError(f"{manifest['kind']} {manifest['metadata']['name']}: {wrong}")


@functools.cache  # overlays have most documents in common, and a check reads megabytes of schemas
def _wrong(manifest: str, version: str) -> str:
    try:
        kubernetes_validate.validate(json.loads(manifest), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return ".".join(str(p) for p in error.path) + ": " + error.message
    return ""


class RaySchemas:
    """The schemas of KubeRay's kinds, from its CRDs; fields that they do not name are refused."""

    def __init__(self, crds: Path) -> None:
        self._validators: dict[tuple[str, str], jsonschema.Draft7Validator] = {}
        for file in sorted(crds.glob("*.yaml")):
            crd = yaml.load(file.read_text(), yaml.CSafeLoader)
            for version in crd["spec"]["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                self._validators[key] = jsonschema.Draft7Validator(schema)

    def errors(self, manifest: dict[str, Any]) -> Iterator[str]:
        """What is wrong with a document of these kinds."""
        validator = self._validators[manifest["apiVersion"], manifest["kind"]]
        for error in validator.iter_errors(manifest):
            yield ".".join(str(p) for p in error.absolute_path) + ": " + error.message


def _strict(schema: Any) -> Any:
    """An OpenAPI schema of a CRD as a JSON schema: unknown fields are refused where it does not keep them, and a
    number-or-text may be either."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "nullable"}
    if "properties" in made:
        made["properties"] = {name: _strict(value) for name, value in made["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = _strict(made[key])
    keeps = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in made and "additionalProperties" not in made and not keeps:
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        if "pattern" in made:  # of text only
            made = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": made["pattern"]}]}
    return made
