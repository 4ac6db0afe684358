"""What a model needs: bytes of weights and cache, GPUs, pods. Arithmetic over a spec; neither torch nor Ray.

`understudy plan` prints it. Counts are of parameters as the checkpoint has them, held in one dtype: quantized weights
are spelled out when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.errors import ConfigError
from workers.model.spec import Attention, DenseFfn, ModelSpec, MoeFfn
from workers.parallel.share import MOST_RANKS, Share, misfit

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 16  # positions in a block of the cache
CACHE_SHARE = 0.8  # of the memory that the weights leave on a GPU, as the engine takes it
# What a process holds beside weights and cache. On a GPU: CUDA's context, work space, the rows of a step. On a host:
# Python, torch and their libraries, buffers for reading.
GPU_RESERVE = 2 << 30
HOST_RESERVE = 4 << 30
CPU_RESERVE = 2 << 30
HOST_CACHE = 32 << 30  # of a replica on GPUs: the most that `host_cache_bytes` is by default


@dataclass(frozen=True)
class Count:
    """Parameters of a model by what a group of ranks does with them."""

    divided: int  # each rank has its part
    repeated: int  # every rank has all of them
    kv: int  # projections to keys and values: divided by their heads, of which a rank has at least one
    experts: int  # of all layers; divided, or elsewhere

    @property
    def total(self) -> int:
        return self.divided + self.repeated + self.kv + self.experts


@dataclass(frozen=True)
class Wish:
    """What is there, and what is asked of it. Bytes and tokens; `gpus` 0 is a plan for CPUs.

    `replicas` None: as many as the GPUs carry. `context` None: the model's. `streams` whole contexts must fit into a
    replica's cache. `expert_hosts` GPUs (or pods) of each replica hold its experts.
    """

    gpus: int
    gpu_memory: int = 0
    gpus_per_node: int = 8
    replicas: int | None = None
    context: int | None = None
    streams: int = 1
    dtype: str = "auto"
    expert_hosts: int = 0
    threads: int = 4
    invariant: bool = False


@dataclass(frozen=True)
class Pod:
    """Resources of one pod, of which there are `count`."""

    role: str
    count: int
    gpus: int
    cpus: int
    memory: int


@dataclass(frozen=True)
class Sizes:
    """A plan. Bytes; `weights_per_rank` and `cache_per_rank` are of one GPU, or of one replica on CPUs."""

    architecture: str
    dtype: str
    parameters: int
    weights: int
    kv_per_token: int
    tensor_parallel: int
    expert_hosts: int
    weights_per_rank: int
    experts_per_host: int
    cache_per_rank: int
    cache_tokens: int
    context: int
    replicas: int
    pods: tuple[Pod, ...]

    @property
    def contexts(self) -> int:
        """Whole contexts that a replica's cache holds at once."""
        return self.cache_tokens // self.context

    @property
    def gpus(self) -> int:
        return sum(pod.count * pod.gpus for pod in self.pods)


def count_parameters(spec: ModelSpec) -> Count:
    """Of a checkpoint of that shape."""
    width = spec.embed_dim or spec.hidden
    vocabulary = spec.vocab_size * width * (1 if spec.tie_embeddings else 2)
    repeated = 2 * spec.hidden * width if spec.embed_dim not in (None, spec.hidden) else 0
    if spec.positions is not None and spec.positions.kind == "learned":
        repeated += (spec.max_context + spec.positions.offset) * spec.hidden
    norms = {"pre": 2, "post": 2, "after": 2, "sandwich": 4}[spec.block.norms] * spec.layers + spec.final_norm
    repeated += norms * spec.hidden * (2 if spec.norm.bias else 1)
    divided, shared, kv = _attention(spec.attention, spec.hidden)
    experts = sum(_experts(ffn, spec.hidden) for ffn in spec.ffn)
    gates = sum(_gate(ffn, spec.hidden) for ffn in spec.ffn)
    dense = sum(_dense(ffn, spec.hidden) for ffn in spec.ffn)
    return Count(
        divided=vocabulary + spec.layers * divided + dense,
        repeated=repeated + spec.layers * shared + gates,
        kv=spec.layers * kv,
        experts=experts,
    )


def _attention(a: Attention, hidden: int) -> tuple[int, int, int]:
    """(divided by heads, repeated at every rank, keys and values) of one layer."""
    if a.latent is not None:
        m = a.latent
        query, per_head = (m.query_rank or hidden), a.heads * (m.nope_dim + m.rope_dim)
        divided = query * per_head + m.rank * a.heads * (m.nope_dim + m.value_dim) + a.heads * m.value_dim * hidden
        first = hidden * m.query_rank + m.query_rank if m.query_rank else 0
        return divided, first + hidden * (m.rank + m.rope_dim) + m.rank, 0
    rows, kv_rows = a.heads * a.head_dim, a.kv_heads * a.head_dim
    divided = 2 * hidden * rows + (rows if a.qkv_bias else 0) + (a.heads if a.sinks else 0)
    normed = {"head": 2 * a.head_dim, "flat": rows + kv_rows, None: 0}[a.qk_norm]
    return divided, normed + (hidden if a.out_bias else 0), 2 * kv_rows * (hidden + a.qkv_bias)


def _dense(ffn: DenseFfn | MoeFfn, hidden: int) -> int:
    if isinstance(ffn, MoeFfn):
        return 3 * hidden * ffn.shared
    bias = (ffn.size * (2 if ffn.gated else 1) + hidden) if ffn.bias else 0
    return (3 if ffn.gated else 2) * hidden * ffn.size + bias


def _experts(ffn: DenseFfn | MoeFfn, hidden: int) -> int:
    if not isinstance(ffn, MoeFfn):
        return 0
    return ffn.experts * (3 * hidden * ffn.size + (2 * ffn.size + hidden if ffn.bias else 0))


def _gate(ffn: DenseFfn | MoeFfn, hidden: int) -> int:
    if not isinstance(ffn, MoeFfn):
        return 0
    return hidden * ffn.experts + ffn.experts * (ffn.gate_bias + ffn.route.bias) + (hidden if ffn.shared_gate else 0)


def stored_parameters(model: Path) -> int | None:
    """Elements of all tensors in the checkpoint's files, by their headers; None where it has no files yet. Raises
    CheckpointError."""
    if not any(model.glob("*.safetensors")):
        return None
    from workers.model.weights import Checkpoint

    return sum(math.prod(entry.shape) for entry in Checkpoint(model).entries.values())


def kv_bytes(spec: ModelSpec, size: int = 1, dtype: str = "auto") -> int:
    """Bytes of the cache for one position at one of `size` ranks."""
    a = Share(0, size).attention(spec.attention)
    return spec.layers * a.values_per_token * BYTES[_dtype(spec, dtype)]


def rank_bytes(spec: ModelSpec, size: int, hosts: int = 0, dtype: str = "auto") -> int:
    """Bytes of weights at one of `size` ranks, its experts included unless `hosts` have them."""
    count, a = count_parameters(spec), spec.attention
    kv = count.kv * len(Share(0, size).kv_heads(a)) // a.kv_heads
    experts = 0 if hosts else math.ceil(count.experts / size)
    return (math.ceil(count.divided / size) + count.repeated + kv + experts) * BYTES[_dtype(spec, dtype)]


def plan_sizes(spec: ModelSpec, wish: Wish) -> Sizes:
    """The smallest degree that has room, and what follows. Raises ConfigError with the numbers where none has."""
    dtype = _dtype(spec, wish.dtype)
    context = wish.context or spec.max_context
    if not 1 <= context <= spec.max_context:
        raise ConfigError(f"--context = {context}: is not within 1 and the model's {spec.max_context}")
    if wish.expert_hosts and not any(isinstance(f, MoeFfn) for f in spec.ffn):
        raise ConfigError(f"--expert-hosts = {wish.expert_hosts}: {spec.architecture} has no experts; leave it out")
    size, cache = (1, _cpu_cache(spec, wish, context)) if wish.gpus == 0 else _degree(spec, wish, context)
    replicas = _replicas(wish, size)
    each = kv_bytes(spec, size, dtype)
    count = count_parameters(spec)
    weights = rank_bytes(spec, size, wish.expert_hosts, dtype)
    experts = math.ceil(count.experts / wish.expert_hosts) * BYTES[dtype] if wish.expert_hosts else 0
    if wish.gpus and experts + GPU_RESERVE > wish.gpu_memory:
        enough = -(-count.experts * BYTES[dtype] // max(1, wish.gpu_memory - GPU_RESERVE))
        raise ConfigError(
            f"--expert-hosts = {wish.expert_hosts}: each holds {_gib(experts)} of experts, more than its GPU of "
            f"{_gib(wish.gpu_memory)}; give at least {enough}"
        )
    return Sizes(
        architecture=spec.architecture,
        dtype=dtype,
        parameters=count.total,
        weights=count.total * BYTES[dtype],
        kv_per_token=kv_bytes(spec, 1, dtype),
        tensor_parallel=size,
        expert_hosts=wish.expert_hosts,
        weights_per_rank=weights,
        experts_per_host=experts,
        cache_per_rank=cache // (each * BLOCK) * each * BLOCK,
        cache_tokens=cache // (each * BLOCK) * BLOCK,
        context=context,
        replicas=replicas,
        pods=tuple(_pods(wish, size, replicas, weights, experts, cache)),
    )


def _degree(spec: ModelSpec, wish: Wish, context: int) -> tuple[int, int]:
    """(the smallest degree whose ranks have room, bytes of cache at each of them)."""
    most = min(MOST_RANKS, wish.gpus_per_node, wish.gpus // (wish.replicas or 1) - wish.expert_hosts)
    tried = []
    for size in range(1, most + 1):
        if misfit(spec, size, wish.invariant, wish.expert_hosts > 0):
            continue
        weights = rank_bytes(spec, size, wish.expert_hosts, wish.dtype)
        cache = int(CACHE_SHARE * max(0, wish.gpu_memory - GPU_RESERVE - weights))
        needed = -(-context // BLOCK) * BLOCK * kv_bytes(spec, size, wish.dtype) * wish.streams
        if cache >= needed:
            return size, cache
        tried.append(f"{size}: {_gib(weights)} of weights leave {_gib(cache)} for a cache of {_gib(needed)}")
    said = "; ".join(tried) or "the GPUs are too few for one rank of each replica"
    raise ConfigError(
        f"{spec.architecture} does not fit {wish.gpus} GPUs of {_gib(wish.gpu_memory)} as {wish.replicas or 1} "
        f"replica(s) with a context of {context}, by degree: {said}; give more GPUs, larger ones, --expert-hosts, or a "
        "smaller --context"
    )


def _cpu_cache(spec: ModelSpec, wish: Wish, context: int) -> int:
    return -(-context // BLOCK) * BLOCK * kv_bytes(spec, 1, wish.dtype) * wish.streams


def _replicas(wish: Wish, size: int) -> int:
    if wish.gpus == 0:
        return wish.replicas or 1
    return wish.replicas or wish.gpus // (size + wish.expert_hosts)


def _pods(wish: Wish, size: int, replicas: int, weights: int, experts: int, cache: int) -> Iterator[Pod]:
    """What a replica needs, times their number. A rank's weights pass through the host's memory as pages of files,
    which need no room of their own."""
    cpu = wish.gpus == 0
    memory = weights + cache + CPU_RESERVE if cpu else size * HOST_RESERVE + HOST_CACHE
    yield Pod("shard", replicas, 0 if cpu else size, size * wish.threads, _round(memory))
    if wish.expert_hosts:
        held = experts + CPU_RESERVE if cpu else HOST_RESERVE
        yield Pod("expert-host", replicas * wish.expert_hosts, 0 if cpu else 1, wish.threads, _round(held))


def _dtype(spec: ModelSpec, dtype: str) -> str:
    return spec.dtype if dtype == "auto" else dtype


def _round(size: int) -> int:
    """Up to a whole GiB."""
    return -(-size // (1 << 30)) << 30


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
