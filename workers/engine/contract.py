"""What an engine takes and gives. Plain data that travels as msgpack, and one protocol that every engine keeps.

`tests/contract/test_engine.py` runs the same suite over every implementation.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import msgspec

from workers.cache.events import Journal
from workers.cache.orders import StoreConfig
from workers.experts.placement import ExpertsPlan


class FinishReason(IntEnum):
    """Why a sequence ended. STOP_SEQUENCE and TIMEOUT are found by whoever knows text and deadlines."""

    EOS = 1
    STOP_SEQUENCE = 2
    STOP_TOKEN = 3
    LENGTH = 4
    CANCELLED = 5
    TIMEOUT = 6
    ERROR = 7


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is chosen; every value is valid. `temperature` 0 is greedy.

    Penalties are those of `workers.engine.penalties`. `logit_bias` holds (token id, addend). No answer contains one
    of the sequences of ids in `bad_words`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    bad_words: list[list[int]] = []


class Thought(msgspec.Struct, frozen=True, array_like=True):
    """What may stand before an answer that has a format: free text up to the token `close`. After it, and before the
    format, line breaks do not count.

    `begun`: the answer begins within it; else it begins where the answer's first token is `open`. Where `grammar` is
    given, what stands before matches it, ends where nothing can follow in it, and is always there; it is written as
    that of calls is.
    """

    close: int = -1
    begun: bool = False
    open: int = -1
    grammar: str = ""


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer's text must match; `text` in the notation of `kind`, checked by `workers.grammar`.

    json_schema: a JSON Schema; json: any JSON object (`text` empty); regex: a regular expression over the whole
    answer; ebnf: a grammar with a rule `root` or `start`; choice: a JSON list of strings; calls: tool calls, in
    llguidance's Lark, written by `router.chat.calls`. It holds for what follows `thought`, where one is.
    """

    kind: str
    text: str = ""
    thought: Thought | None = None


class Interjection(msgspec.Struct, frozen=True, array_like=True):
    """Unless the answer holds `ids` in a row before, they follow after its first `after` tokens: how a thought that
    is longer than its budget is brought to an end. Forced ids count and are reported like drawn ones."""

    after: int
    ids: list[int]


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """What to tell of how each token was chosen. `candidates`: how many of the likeliest; `experts`: which experts
    each mixture layer chose; `attention`: of these layers, what the row attended to, mean over heads."""

    candidates: int = 0
    experts: bool = False
    attention: list[int] = []


class Request(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One sequence to make. Valid by construction: `router.validate` is the only place that checks.

    `prompt` is never empty. `generated` are the tokens that the caller already has (a stream that goes on
    elsewhere): they count towards `max_tokens` and `min_tokens`, are not emitted again, and the draws go on at
    their positions. `len(prompt) + max_tokens` is at most the context. `logprobs` is None for none, else how many
    of the likeliest tokens come with each token; `prompt_logprobs` the same for the prompt's tokens from the second
    on, which are then computed whatever is cached. Sequences with one `family` (not empty) have one prompt: it is
    computed once, and those that come later share the blocks of the first. `traceparent` is the W3C trace context of
    whoever asks, where spans of this sequence are wanted.
    """

    id: str
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    index: int = 0
    generated: list[int] = []
    min_tokens: int = 0
    eos_ids: list[int] = []
    stop_ids: list[int] = []
    logprobs: int | None = None
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    priority: int = 0
    family: str = ""
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    interjection: Interjection | None = None
    probe: Probe | None = None
    traceparent: str = ""


class TokenLogprob(msgspec.Struct, array_like=True):
    """Natural logarithm of a token's probability before temperature and filters; rank 1 is the likeliest.

    `top` holds (token id, logprob), likeliest first, ties by token id.
    """

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Candidate(msgspec.Struct, array_like=True):
    """A token that could have been chosen: its probability by the raw logits, and after everything that the request
    asks for (0: filtered out)."""

    token: int
    before: float
    after: float


class LayerExperts(msgspec.Struct, array_like=True):
    """The experts that one layer chose for a token, in the order of the gate's slots."""

    layer: int
    experts: list[int]
    weights: list[float]


class LayerAttention(msgspec.Struct, array_like=True):
    """What a token's row attended to: `weights[i]` is that of position `start + i`, mean over the heads."""

    layer: int
    start: int
    weights: list[float]


class TokenTrace(msgspec.Struct, array_like=True):
    """How one token came about, as far as the request's `probe` asks."""

    candidates: list[Candidate] = []
    experts: list[LayerExperts] = []
    attention: list[LayerAttention] = []


class SequenceOutput(msgspec.Struct, array_like=True):
    """What one step made for one sequence.

    `token_ids` (several, where the engine speculates) includes the token that ended it (EOS or stop token).
    `cached_tokens` and `prompt_logprobs` are set in the first output of a sequence: how many prompt tokens the prefix
    tree spared (later members of a family say what the first did), and what was asked for of the prompt's tokens from
    the second on. With the former come `cached_host` and `cached_store`: how many more came from host memory and from
    the shared store. `traces` has one entry per token where a probe was asked for. A format that lets nothing follow
    ends its answer with EOS, with or without an EOS token. `error` says what went wrong when `finish` is ERROR. Where
    it is the request's own doing, as when its rules leave no token, `field` is the field to blame, and `error` a text
    for the client; every replica would end so. `computing_us`, in the first output of a sequence whose spans are
    wanted: microseconds since its first step began.
    """

    id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    cached_tokens: int | None = None
    error: str = ""
    prompt_logprobs: list[TokenLogprob] | None = None
    traces: list[TokenTrace] | None = None
    cached_host: int = 0
    cached_store: int = 0
    field: str = ""
    computing_us: int = 0


class StepOutput(msgspec.Struct, array_like=True, tag=True):
    """One step's tokens for one session: at most one entry per sequence. `lost`: the engine as a whole has failed, and
    nothing more will come."""

    step: int
    outputs: list[SequenceOutput]
    lost: str = ""


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine is, told once. `layers` is 0 where nobody says. Prompts of more than `long_prompt` tokens (0: no
    such bound) are computed otherwise, and share no blocks with shorter ones."""

    model: str
    model_fingerprint: str
    numerics_id: str
    architecture: str
    dtype: str
    max_context: int
    vocab_size: int
    block_tokens: int
    blocks: int
    cache_bytes: int
    max_running: int
    chunk_tokens: int
    layers: int = 0
    long_prompt: int = 0


class EngineStats(msgspec.Struct):
    """Counts at one moment; those without a present tense run since the start.

    `waiting_prefill_tokens` are of all prompts not yet computed; `..._normal` of those with priority 0 and more,
    `..._urgent` above 0. `hit_tokens` were found on the device; the others' came from the host's memory and from the
    shared store, in addition. `prefill_rows` are rows of steps that computed prompts, decoders' among them, and
    `prefill_seconds` how long those steps took.
    """

    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    blocks_in_use: int = 0
    blocks_cached: int = 0
    steps: int = 0
    generated_tokens: int = 0
    computed_prompt_tokens: int = 0
    hit_tokens: int = 0
    queried_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    waiting_prefill_normal: int = 0
    waiting_prefill_urgent: int = 0
    prefill_rows: int = 0
    prefill_seconds: float = 0.0
    host_hit_tokens: int = 0
    store_hit_tokens: int = 0
    host_loaded_bytes: int = 0
    host_load_seconds: float = 0.0
    store_loaded_bytes: int = 0
    store_load_seconds: float = 0.0
    store_loads_given_up: int = 0
    store_writes_dropped: int = 0
    store_written_bytes: int = 0
    store_bad_values: int = 0
    store_misses: int = 0
    store_failures: int = 0


class EngineConfig(msgspec.Struct, frozen=True):
    """Sizes and choices of one engine; None is 'from the model and the machine'.

    `dtype` is auto, float32, bfloat16 or float16. `device` is cpu or cuda[:N]. `kernels` is auto, native (C++, CPU
    only), plain (torch alone) or fast (CUDA only: gives up that a row's bits do not depend on its batch); what does
    not apply to the device is a ConfigError. `threads` is of computation. `speculate` is none, ngram (looks the next
    tokens up in the sequence itself) or draft (asks the model in `draft_model_dir`); `draft_tokens` at most per step.
    `tensor_parallel` ranks hold the model together, see `workers.parallel.share`: `expert_parallel` keeps each expert
    whole at one of them, `tensor_parallel_invariant` gives the same bits at every degree that has it.
    `experts`: where a mixture's experts are served; None: here.
    `store`: what lies behind the cache; None: nothing.
    """

    model_dir: str
    name: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    kernels: str = "auto"
    max_context: int | None = None
    cache_bytes: int | None = None
    chunk_tokens: int | None = None
    max_running: int | None = None
    threads: int | None = None
    prefix_cache: bool = True
    speculate: str = "none"
    draft_model_dir: str | None = None
    draft_tokens: int = 4
    tensor_parallel: int = 1
    expert_parallel: bool = False
    tensor_parallel_invariant: bool = False
    experts: ExpertsPlan | None = None
    store: StoreConfig | None = None


class Engine(Protocol):
    """Makes tokens. One thread calls `step`; `add` and `cancel` are called between steps by the same thread.

    `workers.engine.loop.EngineLoop` owns that thread and is what others talk to.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def journal(self) -> Journal:
        """Which blocks it has, as the router is told. Read from any thread."""

    def add(self, request: Request) -> None:
        """Queues a sequence. Its id is not in use. Never blocks, never fails for want of room: it waits."""

    def cancel(self, id: str) -> None:
        """Ends a sequence; its blocks are free before the step after next. Unknown ids are ignored.

        The next `step` reports it with CANCELLED unless it had already finished.
        """

    def step(self) -> list[SequenceOutput]:
        """Runs one step and returns what it made, in the order of admission. Empty when there is nothing to do.

        A failure of the forward ends only the sequences of that step, each with ERROR and the reason.
        """

    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    def stats(self) -> EngineStats: ...

    def check_idle(self) -> None:
        """Raises RuntimeError when anything is still held though no sequence is there. For tests and shutdown."""

    def close(self) -> None:
        """Gives back memory and threads. Idempotent."""
