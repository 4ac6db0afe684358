"""Commands that this room adds to the command line, by the entry-point group `understudy.commands`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

_MODELS, _SERVICE, _SECURITY, _CLUSTER = "Models", "Service", "Security", "Cluster"


def _option(help: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def serve(
    model: Annotated[
        list[str] | None,
        _option("Checkpoint to serve; several times for several (the bundled one).", _MODELS, metavar="[NAME=]DIR"),
    ] = None,
    dtype: Annotated[
        str | None, _option("auto, float32, bfloat16 or float16 (auto: the checkpoint's).", _MODELS)
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda or cuda:N (cpu).", _MODELS)] = None,
    max_context: Annotated[int | None, _option("Tokens of prompt and answer at most (the model's).", _MODELS)] = None,
    cache_bytes: Annotated[
        str | None, _option("Size of the KV cache, such as 4GiB (from the machine).", _MODELS, metavar="SIZE")
    ] = None,
    host_cache_bytes: Annotated[
        str | None, _option("Host memory behind it; 0 for none (from the machine).", _MODELS, metavar="SIZE")
    ] = None,
    chunk_tokens: Annotated[int | None, _option("Rows of a step at most (512).", _MODELS)] = None,
    max_running: Annotated[int | None, _option("Sequences that run at once (64).", _MODELS)] = None,
    threads: Annotated[int | None, _option("Threads of computation per replica (an even share).", _MODELS)] = None,
    speculate: Annotated[
        str | None,
        _option("auto, none, ngram or draft: where drafts of the next tokens come from (auto: --draft-model)", _MODELS),
    ] = None,
    draft_model: Annotated[
        Path | None, _option("A smaller checkpoint of the same vocabulary, to draft with.", _MODELS, metavar="DIR")
    ] = None,
    draft_tokens: Annotated[int | None, _option("Tokens of a draft at most (4).", _MODELS)] = None,
    tensor_parallel: Annotated[
        int | None, _option("Processes that share each replica's model (1).", _MODELS, metavar="N")
    ] = None,
    expert_parallel: Annotated[
        bool | None, _option("Keep each expert whole at one of those processes.", _MODELS, "--expert-parallel")
    ] = None,
    tensor_parallel_invariant: Annotated[
        bool | None,
        _option("The same bits at every --tensor-parallel, a little slower.", _MODELS, "--tensor-parallel-invariant"),
    ] = None,
    expert_hosts: Annotated[
        int | None, _option("Hosts per replica that serve a mixture's experts (0: the replica itself).", _MODELS)
    ] = None,
    replicas: Annotated[str | None, _option("Replicas of each model (1).", _MODELS, metavar="N")] = None,
    host: Annotated[str | None, _option("Where the gateway listens (127.0.0.1).", _SERVICE)] = None,
    port: Annotated[int | None, _option("Its port; 0 takes a free one (50051).", _SERVICE)] = None,
    gateways: Annotated[int | None, _option("Gateway processes that share the port (1).", _SERVICE)] = None,
    admin_port: Annotated[int | None, _option("Operators' gRPC, on loopback (50052).", _SERVICE)] = None,
    metrics_port: Annotated[int | None, _option("Prometheus, on loopback (9464).", _SERVICE)] = None,
    max_streams: Annotated[int | None, _option("Streams that a gateway carries at once (4096).", _SERVICE)] = None,
    max_message_bytes: Annotated[
        str | None, _option("Size of a request at most (16MiB).", _SERVICE, metavar="SIZE")
    ] = None,
    max_queue: Annotated[int | None, _option("Sequences that wait at a replica at most (256).", _SERVICE)] = None,
    max_queued_tokens: Annotated[
        int | None, _option("Prompt tokens that wait at a replica at most (1048576).", _SERVICE)
    ] = None,
    max_service_queue: Annotated[
        int | None, _option("Sequences that wait in the whole service at most (no bound).", _SERVICE)
    ] = None,
    drain_seconds: Annotated[
        float | None, _option("How long a leaving replica lets streams end (30).", _SERVICE)
    ] = None,
    heartbeat_timeout: Annotated[
        float | None, _option("Seconds of silence until a replica counts as lost (2).", _SERVICE)
    ] = None,
    tls_cert: Annotated[Path | None, _option("Certificate chain (PEM).", _SECURITY, metavar="FILE")] = None,
    tls_key: Annotated[Path | None, _option("Its key (PEM).", _SECURITY, metavar="FILE")] = None,
    tls_client_ca: Annotated[
        Path | None, _option("Clients must show a certificate of this authority (PEM).", _SECURITY, metavar="FILE")
    ] = None,
    tokens: Annotated[
        Path | None, _option("Bearer tokens, one `TOKEN TENANT [SALT]` per line.", _SECURITY, metavar="FILE")
    ] = None,
    redis_url: Annotated[
        str | None, _option("Redis that keeps prefixes for all replicas; none for none (one of our own).", _CLUSTER)
    ] = None,
    redis_bytes: Annotated[
        str | None, _option("Memory of a Redis of our own (an eighth of the machine's).", _CLUSTER, metavar="SIZE")
    ] = None,
    store_key: Annotated[
        Path | None, _option("Secret that signs what is kept in Redis.", _CLUSTER, metavar="FILE")
    ] = None,
    ray_address: Annotated[
        str | None, _option("Join a running Ray cluster (a local one of our own).", _CLUSTER, metavar="ADDRESS")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, _option("Where spans go by OTLP over gRPC, such as http://127.0.0.1:4317 (nowhere).", _CLUSTER)
    ] = None,
    config: Annotated[
        Path | None, _option("The same keys in YAML, and `models:` with a section each.", _CLUSTER, metavar="FILE")
    ] = None,
    verbose: Annotated[bool | None, _option("All logs on the console.", _CLUSTER, "--verbose")] = None,
    engine: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve models over gRPC until Ctrl-C or SIGTERM; then drain and leave no process behind.

    Flags win over UNDERSTUDY_… in the environment, that over --config.
    """
    flags = {k: v for k, v in locals().items() if k != "config" and v is not None}
    from cluster.config import load
    from cluster.console import Console
    from cluster.serve import run

    raise typer.Exit(run(load(flags, os.environ, config), Console()))
