"""How many hosts a model's experts can have, known from its config.json alone."""

from __future__ import annotations

from understudy.errors import ConfigError
from workers.model.spec import ModelSpec, MoeFfn


def expert_layers(spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the layers that have experts, how many each of them has)."""
    found = [(i, ffn.experts) for i, ffn in enumerate(spec.ffn) if isinstance(ffn, MoeFfn)]
    return tuple(i for i, _ in found), tuple(count for _, count in found)


def check_hosts(spec: ModelSpec, hosts: int, label: str) -> None:
    """Raises ConfigError, with the nearest that works, where the model has not so many experts. `label` is the key."""
    _, experts = expert_layers(spec)
    if not experts:
        raise ConfigError(f"{label} = {hosts}: {spec.architecture} has no experts; leave it out")
    if hosts > max(experts):
        raise ConfigError(
            f"{label} = {hosts}: {spec.architecture} has {max(experts)} experts in a layer, so that some hosts would "
            f"have none; give at most {max(experts)}"
        )
