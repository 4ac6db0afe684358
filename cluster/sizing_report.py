"""A plan of sizes as people, programs and Kubernetes read it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from cluster.sizing import Pod, Sizes, Wish

_ROLES = {"shard": ("shards", {"understudy_replica": "1", "understudy_shard": "16"})}
_ROLES |= {"expert-host": ("expert-hosts", {"understudy_expert_host": "1"})}


def settings(sizes: Sizes, wish: Wish, model: Path) -> dict[str, Any]:
    """Keys of the configuration that follow from a plan, `model` among them."""
    keys: dict[str, Any] = {"model": str(model)}
    if wish.gpus:
        keys["device"] = "cuda"
    else:
        keys["cache_bytes"] = sizes.cache_per_rank
    if wish.dtype != "auto":
        keys["dtype"] = wish.dtype
    if sizes.tensor_parallel > 1:
        keys["tensor_parallel"] = sizes.tensor_parallel
    if wish.invariant:
        keys["tensor_parallel_invariant"] = True
    if sizes.expert_hosts:
        keys["expert_hosts"] = sizes.expert_hosts
    return keys | {"max_context": sizes.context, "replicas": sizes.replicas, "threads": wish.threads}


def flags(keys: dict[str, Any]) -> str:
    """The same as a command line."""
    words = ["understudy", "serve"]
    for key, value in keys.items():
        words.append("--" + key.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def as_json(sizes: Sizes, wish: Wish, model: Path) -> dict[str, Any]:
    """Bytes and counts, and the keys of the configuration."""
    keys = settings(sizes, wish, model)
    return dataclasses.asdict(sizes) | {"contexts": sizes.contexts, "gpus": sizes.gpus, "settings": keys}


def as_yaml(sizes: Sizes, wish: Wish, model: Path) -> str:
    """What goes into k8s/: the application's `args`, and resources of its worker groups."""
    keys = settings(sizes, wish, model)
    path = keys.pop("model")
    tree = {
        "args": {"models": {model.resolve().name: {"path": path} | keys}},
        "workerGroupSpecs": [_group(pod) for pod in sizes.pods],
    }
    return str(yaml.safe_dump(tree, sort_keys=False))


def _group(pod: Pod) -> dict[str, Any]:
    name, resources = _ROLES[pod.role]
    needs: dict[str, Any] = {"cpu": str(pod.cpus), "memory": f"{pod.memory >> 30}Gi"}
    if pod.gpus:
        needs["nvidia.com/gpu"] = pod.gpus
    container = {"name": "ray-worker", "resources": {"requests": needs, "limits": dict(needs)}}
    return {
        "groupName": name,
        "replicas": pod.count,
        "minReplicas": pod.count,
        "maxReplicas": pod.count,
        "resources": dict(resources),
        "template": {"spec": {"containers": [container]}},
    }


def as_text(sizes: Sizes, wish: Wish, model: Path) -> str:
    """A few lines for a terminal."""
    s, where = sizes, "GPU" if wish.gpus else "replica"
    lines = [
        f"{s.architecture}: {s.parameters:,} parameters, {_gib(s.weights)} in {s.dtype}; "
        f"{s.kv_per_token:,} bytes of cache per token",
        f"each {where}: {_gib(s.weights_per_rank)} of weights, {_gib(s.cache_per_rank)} of cache",
        f"each replica: {s.tensor_parallel} rank(s), a cache of {s.cache_tokens:,} tokens, which is "
        f"{s.contexts} context(s) of {s.context:,}",
    ]
    if s.expert_hosts:
        lines.append(f"its experts: on {s.expert_hosts} hosts with {_gib(s.experts_per_host)} each")
    for pod in s.pods:
        gpus = f"{pod.gpus} GPU(s), " if pod.gpus else ""
        lines.append(f"pods: {pod.count} x {pod.role}: {gpus}{pod.cpus} CPUs, {pod.memory >> 30} GiB")
    if wish.gpus:
        lines.append(f"GPUs: {s.gpus} of {wish.gpus}")
    return "\n".join([*lines, flags(settings(sizes, wish, model))])


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
