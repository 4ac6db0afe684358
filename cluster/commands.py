"""Commands that this room adds to the command line, by the entry-point group `understudy.commands`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.config import ServiceConfig

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
    replicas: Annotated[
        str | None, _option("Replicas of each model: N, or by demand MIN:MAX (1).", _MODELS, metavar="N|MIN:MAX")
    ] = None,
    target_first_token: Annotated[
        float | None, _option("Seconds in which a first token should come; else replicas are added (2).", _MODELS)
    ] = None,
    idle_seconds: Annotated[
        float | None, _option("Without requests for so long a model whose MIN is 0 has no replica (300).", _MODELS)
    ] = None,
    scale_down_seconds: Annotated[
        float | None, _option("For so long fewer replicas must have been enough until there are fewer (60).", _MODELS)
    ] = None,
    surge_percent: Annotated[
        int | None, _option("More replicas than usual while a new checkpoint replaces an old one (25).", _MODELS)
    ] = None,
    host: Annotated[str | None, _option("Where the gateway listens (127.0.0.1).", _SERVICE)] = None,
    port: Annotated[int | None, _option("Its port; 0 takes a free one (50051).", _SERVICE)] = None,
    gateways: Annotated[int | None, _option("Gateway processes that share the port (1).", _SERVICE)] = None,
    admin_port: Annotated[int | None, _option("Operators' gRPC, on loopback (50052).", _SERVICE)] = None,
    metrics_port: Annotated[int | None, _option("Prometheus (9464).", _SERVICE)] = None,
    metrics_host: Annotated[str | None, _option("Where Prometheus may ask (127.0.0.1).", _SERVICE)] = None,
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
    step_timeout: Annotated[
        float | None, _option("Seconds that one step may take before its replica is replaced (60).", _SERVICE)
    ] = None,
    cold_start_seconds: Annotated[
        float | None, _option("How long a request waits for a replica where there is none (300).", _SERVICE)
    ] = None,
    tls_cert: Annotated[Path | None, _option("Certificate chain (PEM).", _SECURITY, metavar="FILE")] = None,
    tls_key: Annotated[Path | None, _option("Its key (PEM).", _SECURITY, metavar="FILE")] = None,
    tls_client_ca: Annotated[
        Path | None, _option("Clients must show a certificate of this authority (PEM).", _SECURITY, metavar="FILE")
    ] = None,
    tokens: Annotated[
        Path | None, _option("Bearer tokens, one `TOKEN TENANT [SALT]` per line.", _SECURITY, metavar="FILE")
    ] = None,
    insecure: Annotated[
        bool | None,
        _option(
            "Listen anywhere without TLS and tokens: only behind something that has them.", _SECURITY, "--insecure"
        ),
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
    wire_key: Annotated[
        Path | None,
        _option("Secret by which gateways and leaders know each other (drawn at the start).", _CLUSTER, metavar="FILE"),
    ] = None,
    ray_address: Annotated[
        str | None, _option("Join a running Ray cluster (a local one of our own).", _CLUSTER, metavar="ADDRESS")
    ] = None,
    place_by_role: Annotated[
        bool | None,
        _option("Only on Ray nodes that have the resources of a process's role.", _CLUSTER, "--place-by-role"),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, _option("Where spans go by OTLP over gRPC, such as http://127.0.0.1:4317 (nowhere).", _CLUSTER)
    ] = None,
    config: Annotated[
        Path | None, _option("The same keys in YAML, and `models:` with a section each.", _CLUSTER, metavar="FILE")
    ] = None,
    verbose: Annotated[bool | None, _option("All logs on the console.", _CLUSTER, "--verbose")] = None,
    engine: Annotated[str | None, typer.Option(hidden=True)] = None,
    fake_rows: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve models over gRPC until Ctrl-C or SIGTERM; then drain and leave no process behind.

    Flags win over UNDERSTUDY_… in the environment, that over --config. SIGHUP reads --config again: models that have
    changed in it are replaced while requests run.
    """
    flags = {k: v for k, v in locals().items() if k != "config" and v is not None}
    from cluster.config import load
    from cluster.console import Console
    from cluster.serve import run

    def read() -> ServiceConfig:
        return load(flags, os.environ, config)

    raise typer.Exit(run(read(), Console(), None if config is None else read))


def plan(
    model: Annotated[Path, typer.Option(help="Checkpoint; its config.json is enough.", metavar="DIR")],
    gpus: Annotated[int, typer.Option(min=0, help="GPUs that there are; 0 plans for CPUs.")] = 0,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Of each of them, such as 80GB.")] = "80GB",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="In one machine: a replica's ranks share one.")] = 8,
    replicas: Annotated[int | None, typer.Option(min=1, help="As many as there is room for by default.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer (the model's).")] = None,
    streams: Annotated[int, typer.Option(min=1, help="Whole contexts that a replica's cache must hold.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    expert_hosts: Annotated[int, typer.Option(min=0, help="Hosts per replica for a mixture's experts.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPUs of each rank.")] = 4,
    invariant: Annotated[
        bool, typer.Option("--tensor-parallel-invariant", help="Only degrees that give the same bits.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print what goes into the manifests of k8s/.")] = False,
) -> None:
    """Compute from a checkpoint what serving it needs: GPUs, memory, pods, and the flags of `serve`."""
    from cluster import sizing_report
    from cluster.sizing import BYTES, Wish, plan_sizes, stored_parameters
    from cluster.written import parse_size
    from understudy.cli.common import as_json
    from understudy.errors import ConfigError
    from workers.model.config import read_spec

    try:
        memory = int(str(parse_size(gpu_memory)))
    except ValueError as error:
        raise ConfigError(f"--gpu-memory = {gpu_memory!r}: {error}") from error
    if dtype not in ("auto", *BYTES):
        raise ConfigError(f"--dtype = {dtype!r}: is not one of auto, {', '.join(BYTES)}")
    wish = Wish(gpus, memory, gpus_per_node, replicas, context, streams, dtype, expert_hosts, threads, invariant)
    spec = read_spec(model)
    sizes = plan_sizes(spec, wish)
    stored = stored_parameters(model) if spec.quantization is None else None
    if stored is not None and abs(stored - sizes.parameters) > 0.01 * sizes.parameters:
        said = (
            f"warning: the files hold {stored:,} parameters, config.json implies {sizes.parameters:,}, which count here"
        )
        typer.echo(said, err=True)
    if json:
        typer.echo(as_json(sizing_report.as_json(sizes, wish, model)))
    elif yaml:
        typer.echo(sizing_report.as_yaml(sizes, wish, model), nl=False)
    else:
        typer.echo(sizing_report.as_text(sizes, wish, model))
