"""A protobuf request becomes one frozen `ValidRequest`, or an InvalidRequest that names field, value and bound.

Nothing is checked again after this. What the API names and this version does not serve is refused, never dropped.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from router.models import ServedModel
from understudy.errors import CannotResume, InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineInfo, Request, Sampling

MAX_REQUEST_ID = 128
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_BYTES = 256
MAX_LOGPROBS = 20
_SHOWN = 60  # characters of a value that an error repeats


@dataclass(frozen=True)
class Bound:
    """An interval; `open_low` leaves out its lower end."""

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value) and (self.low < value if self.open_low else self.low <= value) and value <= self.high
        )

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


BOUNDS = {
    "sampling.temperature": Bound(0, 100),
    "sampling.top_k": Bound(0, 2**31 - 1),
    "sampling.top_p": Bound(0, 1, open_low=True),
    "sampling.min_p": Bound(0, 1),
    "sampling.repetition_penalty": Bound(0, 10, open_low=True),
    "sampling.presence_penalty": Bound(-2, 2),
    "sampling.frequency_penalty": Bound(-2, 2),
    "sampling.n": Bound(1, 128),
    "response.logprobs": Bound(0, MAX_LOGPROBS),
    "response.prompt_logprobs": Bound(0, MAX_LOGPROBS),
    "priority": Bound(-100, 100),
}


@dataclass(frozen=True)
class ValidRequest:
    """One request, complete: every default is filled in and every value is within its bound.

    `received` are the tokens that the client already has of a stream that goes on here, and `pinned` the model
    fingerprint and numerics id that it must go on with.
    """

    request_id: str
    model: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    min_tokens: int
    eos_ids: list[int]
    stop: tuple[str, ...]
    stop_ids: list[int]
    include_stop: bool
    want_token_ids: bool
    logprobs: int | None
    trace: bool
    cache_salt: str
    bypass_prefix_cache: bool
    priority: int
    received: list[int]
    pinned: tuple[str, str] | None

    def to_engine(self, id: str, generated: list[int]) -> Request:
        """What a replica is sent; `generated` are the tokens that need not be made again."""
        return Request(
            id=id,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            generated=generated,
            min_tokens=self.min_tokens,
            eos_ids=self.eos_ids,
            stop_ids=self.stop_ids,
            logprobs=self.logprobs,
            cache_salt=self.cache_salt,
            bypass_prefix_cache=self.bypass_prefix_cache,
            priority=self.priority,
        )


def show(value: object) -> str:
    """A value for an error message, never longer than a header may be."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _within(field: str, value: float) -> float:
    if value not in BOUNDS[field]:
        raise InvalidRequest(f"is {value:g}; it must be in {BOUNDS[field]}", field)
    return value


def _unsupported(field: str, way_out: str) -> InvalidRequest:
    return InvalidRequest(f"is not supported yet; {way_out}", field)


def check_token_ids(field: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list. Raises InvalidRequest naming the first id that is outside the vocabulary."""
    found = list(ids)
    if found and max(found) >= vocab_size:
        index = next(i for i, id in enumerate(found) if id >= vocab_size)
        raise InvalidRequest(
            f"[{index}] is {found[index]}; ids must be below the vocabulary size of {vocab_size}", field
        )
    return found


def valid_request_id(given: str) -> str:
    """`given`, or a fresh id where it is empty. Raises InvalidRequest."""
    if not given:
        return secrets.token_hex(8)
    if len(given) > MAX_REQUEST_ID:
        raise InvalidRequest(f"has {len(given)} characters; at most {MAX_REQUEST_ID} are allowed", "request_id")
    if not all(0x20 <= ord(c) < 0x7F for c in given):
        raise InvalidRequest(f"is {show(given)}; only printable ASCII characters are allowed", "request_id")
    return given


def _sampling(message: pb.Sampling, model: ServedModel, seed: int) -> Sampling:
    d = model.defaults

    def number(name: str, default: float) -> float:
        return _within(f"sampling.{name}", getattr(message, name)) if message.HasField(name) else default

    if number("n", 1) != 1:
        raise _unsupported("sampling.n", f"is {message.n}: leave it out or set 1, and send the request several times")
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if number(name, neutral) != neutral:
            raise _unsupported(f"sampling.{name}", f"leave it out or set {neutral:g}")
    if message.logit_bias:
        raise _unsupported("sampling.logit_bias", "leave it out")
    return Sampling(
        temperature=number("temperature", d.temperature),
        top_k=int(number("top_k", d.top_k)),
        top_p=number("top_p", d.top_p),
        min_p=number("min_p", d.min_p),
        seed=seed,
    )


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"has {len(stops)} strings; at most {MAX_STOPS} are allowed", "stopping.stop")
    for i, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidRequest(
                f"[{i}] has {size} bytes; each must have between 1 and {MAX_STOP_BYTES} bytes of UTF-8", "stopping.stop"
            )
    return tuple(dict.fromkeys(stops))


def _room(prompt_tokens: int, max_context: int) -> int:
    """Tokens that the context has left for the answer: at least one. Raises InvalidRequest."""
    if prompt_tokens >= max_context:
        raise InvalidRequest(
            f"has {prompt_tokens} tokens; with at least one token of answer it must fit the model's context of "
            f"{max_context}: shorten it to {max_context - 1}",
            "prompt",
        )
    return max_context - prompt_tokens


def _lengths(message: pb.Stopping, prompt_tokens: int, max_context: int) -> tuple[int, int]:
    """max_tokens and min_tokens."""
    room = _room(prompt_tokens, max_context)
    max_tokens = message.max_tokens if message.HasField("max_tokens") else room
    if max_tokens < 1:
        raise InvalidRequest("is 0; it must be at least 1", "stopping.max_tokens")
    if max_tokens > room:
        raise InvalidRequest(
            f"is {max_tokens}; with {prompt_tokens} prompt tokens the model's context of {max_context} leaves room for "
            f"{room}: ask for that many, or leave it out",
            "stopping.max_tokens",
        )
    if message.min_tokens > max_tokens:
        raise InvalidRequest(
            f"is {message.min_tokens}; it must be at most max_tokens, which is {max_tokens}", "stopping.min_tokens"
        )
    return max_tokens, message.min_tokens


def _prompt(request: pb.GenerateRequest, model: ServedModel, encoded: list[int] | None) -> list[int]:
    """The prompt's ids; `encoded` are those of its text."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        _room(len(request.token_ids.ids), model.info.max_context)  # before millions of them are looked at
        ids = check_token_ids("token_ids.ids", request.token_ids.ids, model.info.vocab_size)
        if not ids:
            raise InvalidRequest("is empty; give at least one token id", "token_ids.ids")
    elif kind == "text":
        ids = encoded if encoded is not None else model.text.encode(request.text)
        if not ids:
            raise InvalidRequest(
                "is empty and this model's tokenizer adds no token to it; give at least one character", "text"
            )
    else:
        raise InvalidRequest("is missing; give text or token_ids", "prompt")
    return ids


def _check_identity(resume: pb.Resume, infos: Sequence[EngineInfo]) -> tuple[str, str]:
    """Fingerprint and numerics id of a stream that goes on. Raises CannotResume where nobody here has both."""
    pinned = (resume.model_fingerprint, resume.numerics_id)
    if any((i.model_fingerprint, i.numerics_id) == pinned for i in infos):
        return pinned
    prints = sorted({i.model_fingerprint for i in infos})
    if resume.model_fingerprint not in prints:
        field, given, here = "resume.model_fingerprint", resume.model_fingerprint, prints
    else:
        field, given, here = "resume.numerics_id", resume.numerics_id, sorted({i.numerics_id for i in infos})
    raise CannotResume(
        f"{field}: is {show(given)}, here it is {' or '.join(show(h) for h in here[:3])}: "
        "the stream cannot go on identically; start anew"
    )


def _resumed(request: pb.GenerateRequest, model: ServedModel) -> tuple[list[int], list[int]]:
    """Prompt and received ids of a stream that goes on. Raises InvalidRequest."""
    resume, info = request.resume, model.info
    prompt = check_token_ids("resume.prompt_token_ids", resume.prompt_token_ids, info.vocab_size)
    if not prompt:
        raise InvalidRequest("is empty; give the ids of PromptInfo", "resume.prompt_token_ids")
    if request.WhichOneof("prompt") == "token_ids" and list(request.token_ids.ids) != prompt:
        raise InvalidRequest("differs from token_ids; send the request as it was", "resume.prompt_token_ids")
    received: list[int] = []
    for i, state in enumerate(resume.sequences):
        if state.index != 0 or i > 0:
            raise InvalidRequest(f"[{i}] has index {state.index}; this request has one sequence, 0", "resume.sequences")
        received = check_token_ids("resume.sequences[0].token_ids", state.token_ids, info.vocab_size)
    return prompt, received


def _seed(request: pb.GenerateRequest, resumed: bool, draw: Callable[[], int]) -> int:
    given = request.sampling.seed if request.sampling.HasField("seed") else None
    if resumed:
        if given is not None and given != request.resume.seed:
            raise InvalidRequest(
                f"is {request.resume.seed}, but sampling.seed is {given}; they must agree", "resume.seed"
            )
        return request.resume.seed
    return draw() if given is None else given


def _salt(kv: pb.KvOptions, tenant: str) -> str:
    """The tenant, and within it the caller's own salt: nobody can name another tenant's prefixes."""
    size = len(kv.cache_salt.encode())
    if size > MAX_SALT_BYTES:
        raise InvalidRequest(f"has {size} bytes; at most {MAX_SALT_BYTES} are allowed", "kv.cache_salt")
    return f"{tenant}\x1f{kv.cache_salt}" if kv.cache_salt else tenant


def draw_seed() -> int:
    """A seed for a request that brings none."""
    return secrets.randbits(63)


def validate(
    request: pb.GenerateRequest,
    model: ServedModel,
    *,
    tenant: str = "",
    encoded: list[int] | None = None,
    infos: Sequence[EngineInfo] = (),
    draw: Callable[[], int] = draw_seed,
) -> ValidRequest:
    """The whole check. `encoded` are the ids of `request.text` where the caller has them already; `infos` are the
    replicas that a stream could go on at, where they are known better than by `model.info`.

    Raises InvalidRequest or CannotResume.
    """
    info, stopping, response = model.info, request.stopping, request.response
    request_id = valid_request_id(request.request_id)
    _within("priority", request.priority)
    resumed = request.HasField("resume")
    sampling = _sampling(request.sampling, model, _seed(request, resumed, draw))
    stops = _stop_strings(stopping.stop)
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"has {len(stopping.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
            "stopping.stop_token_ids",
        )
    stop_ids = check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, info.vocab_size)
    if response.HasField("prompt_logprobs"):
        _within("response.prompt_logprobs", response.prompt_logprobs)
        raise _unsupported("response.prompt_logprobs", "leave it out")
    if response.echo:
        raise _unsupported("response.echo", "leave it out, and put the prompt before the answer yourself")
    logprobs = int(_within("response.logprobs", response.logprobs)) if response.HasField("logprobs") else None
    salt = _salt(request.kv, tenant)
    pinned = _check_identity(request.resume, infos or (info,)) if resumed else None
    prompt, received = _resumed(request, model) if resumed else (_prompt(request, model, encoded), [])
    max_tokens, min_tokens = _lengths(stopping, len(prompt), info.max_context)
    if len(received) > max_tokens:
        raise InvalidRequest(
            f"has {len(received)} ids, more than max_tokens, which is {max_tokens}", "resume.sequences[0].token_ids"
        )
    return ValidRequest(
        request_id=request_id,
        model=model.name,
        prompt=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_ids=[] if stopping.ignore_eos else list(model.defaults.eos_token_ids),
        stop=stops,
        stop_ids=stop_ids,
        include_stop=stopping.include_stop,
        want_token_ids=response.token_ids if response.HasField("token_ids") else True,
        logprobs=logprobs,
        trace=response.trace,
        cache_salt=salt,
        bypass_prefix_cache=request.kv.bypass_prefix_cache,
        priority=request.priority,
        received=received,
        pinned=pinned,
    )
