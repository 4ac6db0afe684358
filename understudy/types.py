"""What a caller gets: plain frozen values, free of gRPC and protobuf. Names follow `proto/understudy/v1`."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class FinishReason(enum.StrEnum):
    """Why an answer ended; the value is the API's own word."""

    EOS = "FINISH_REASON_EOS"
    STOP_SEQUENCE = "FINISH_REASON_STOP_SEQUENCE"
    STOP_TOKEN = "FINISH_REASON_STOP_TOKEN"
    LENGTH = "FINISH_REASON_LENGTH"
    CANCELLED = "FINISH_REASON_CANCELLED"
    TIMEOUT = "FINISH_REASON_TIMEOUT"
    TOOL_CALLS = "FINISH_REASON_TOOL_CALLS"


class Health(enum.StrEnum):
    """What `grpc.health.v1` says of a service."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A likely token. `logprob` is the natural logarithm of its probability before temperature and filters."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprob:
    """The chosen token; `rank` 1 is the likeliest, `top` holds the likeliest ones, likeliest first."""

    token_id: int
    text: str
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have been chosen: its probability by the model alone, and after temperature, penalties,
    filters and format, with which the token was drawn."""

    token_id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """The experts that one layer of a mixture chose for a token, and what each of them counted for."""

    layer: int
    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """What a token attended to in one layer, mean over heads: `weights[i]` is that of position `start + i`."""

    layer: int
    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """How one token was chosen. `candidates` are likeliest first, the chosen token among them."""

    token_id: int
    candidates: tuple[Candidate, ...] = ()
    experts: tuple[ExpertChoice, ...] = ()
    attention: tuple[Attention, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """When and how tokens were made: microseconds since the server took the request, the engine's step, and one entry
    per token id."""

    server_us: int
    step: int
    tokens: tuple[TokenTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool, called by the model; `arguments` are of JSON's types."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `role` is system, user, assistant or tool; `reasoning` and `tool_calls` are the
    assistant's, `tool_call_id` and `name` a tool's."""

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, never cumulative. `token_ids` are exactly those whose text this completes.

    `logprobs` has one entry per token id where they were asked for, else it is empty. `index` says which of the n
    sequences it belongs to. With `echo` this is the prompt, as it was asked for: its ids are no part of the answer.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    index: int = 0
    trace: Trace | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Prompt tokens that were not computed, by where their keys and values lay."""

    device: int = 0
    host: int = 0
    store: int = 0


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What the service made of the prompt: with the request, everything that is needed to go on elsewhere.

    `prompt_logprobs` has one entry per prompt token from the second on, where they were asked for.
    """

    request_id: str
    model: str
    model_fingerprint: str
    numerics_id: str
    prompt_token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: CachedTokens
    seed: int
    prompt_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted; `completion_tokens` up to and with the token that ended the answer, `reasoning_tokens` those of
    them that a chat's answer thought."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended. `matched` is the stop string or the stop token's id, where one of them ended it."""

    index: int
    reason: FinishReason
    matched: str | int | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole sequence. Its text begins with the prompt where `echo` was asked for, its token ids never do;
    `traces` has one entry per token id where `trace` was asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    finish: Finish
    traces: tuple[TokenTrace, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: `choices` holds the n sequences in the order of their index; the shortcuts mean the first."""

    prompt: PromptInfo
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> tuple[Logprob, ...]:
        return self.choices[0].logprobs

    @property
    def finish(self) -> Finish:
        return self.choices[0].finish


@dataclass(frozen=True, slots=True)
class Tokens:
    """An encoded text: `texts` holds the text of each id, U+FFFD where its bytes are no whole characters."""

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    max_context: int


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the service answers for."""

    name: str
    model_fingerprint: str
    numerics_id: str
    max_context: int
    vocab_size: int
    dtype: str
    architecture: str
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. Without `ca` the system's roots are trusted; `cert` and `key` go together (mutual TLS).

    `server_name` is the name that the server's certificate carries, where it differs from the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class Retry:
    """How hard a client tries again after UNAVAILABLE or a lost connection; before a try it waits up to
    `first_delay_s * 2**k`, at most `max_delay_s`, between half and all of it by chance.

    `attempts` bounds the tries (the first one included) before the service has said anything; `resume_attempts`
    and `resume_s` (seconds) bound those of a stream that broke, counted anew whenever it makes progress.
    `Retry(attempts=1, resume_attempts=0)` never tries again.
    """

    attempts: int = 4
    resume_attempts: int = 30
    resume_s: float = 60.0
    first_delay_s: float = 0.05
    max_delay_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, the first try; got {self.attempts}")
        for name in ("resume_attempts", "resume_s", "first_delay_s", "max_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
