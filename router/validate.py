"""A protobuf request becomes one frozen `ValidRequest`, or an InvalidRequest that names field, value and bound.

Nothing is checked again after this. What contradicts itself is refused, never half served.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from router import choosing
from router.bounds import check_strings, check_token_ids, show, within
from router.format import grammar_of
from router.models import ServedModel
from understudy.errors import CannotResume, InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineInfo, Grammar, Interjection, Probe, Request, Sampling

MAX_REQUEST_ID = 128
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_SALT_BYTES = 256


@dataclass(frozen=True)
class ValidRequest:
    """One request, complete: every default is filled in and every value is within its bound.

    `received` are the tokens that the client already has of a stream that goes on here, by sequence: one that is not
    there starts anew. `pinned` are the model fingerprint and numerics id that it must go on with; None where the
    stream begins here. `fingerprint` is that of the version that it was checked for; empty where any will do.
    """

    request_id: str
    model: str
    prompt: list[int]
    sampling: Sampling
    n: int
    max_tokens: int
    min_tokens: int
    eos_ids: list[int]
    stop: tuple[str, ...]
    stop_ids: list[int]
    include_stop: bool
    want_token_ids: bool
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    probe: Probe | None
    cache_salt: str
    bypass_prefix_cache: bool
    priority: int
    received: Mapping[int, list[int]]
    pinned: tuple[str, str] | None
    grammar: Grammar | None = None
    interjection: Interjection | None = None
    fingerprint: str = ""

    def received_of(self, index: int) -> list[int]:
        """What the client has of one sequence."""
        return self.received.get(index, [])

    def to_engine(
        self,
        id: str,
        index: int,
        generated: list[int],
        family: str = "",
        prompt_logprobs: bool = False,
        traceparent: str = "",
    ) -> Request:
        """What a replica is sent of one sequence; `generated` are the tokens that need not be made again.

        Of the sequences of one prompt, which have one `family`, one tells its logprobs where they are asked for.
        """
        return Request(
            id=id,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            index=index,
            generated=generated,
            min_tokens=self.min_tokens,
            eos_ids=self.eos_ids,
            stop_ids=self.stop_ids,
            logprobs=self.logprobs,
            cache_salt=self.cache_salt,
            bypass_prefix_cache=self.bypass_prefix_cache,
            priority=self.priority,
            family=family,
            prompt_logprobs=self.prompt_logprobs if prompt_logprobs else None,
            grammar=self.grammar,
            interjection=self.interjection,
            probe=self.probe,
            traceparent=traceparent,
        )


def valid_request_id(given: str) -> str:
    """`given`, or a fresh id where it is empty. Raises InvalidRequest."""
    if not given:
        return secrets.token_hex(8)
    if len(given) > MAX_REQUEST_ID:
        raise InvalidRequest(f"has {len(given)} characters; at most {MAX_REQUEST_ID} are allowed", "request_id")
    if not all(0x20 <= ord(c) < 0x7F for c in given):
        raise InvalidRequest(f"is {show(given)}; only printable ASCII characters are allowed", "request_id")
    return given


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


def _prompt(request: pb.GenerateRequest, model: ServedModel) -> list[int]:
    """The prompt's ids. Raises InvalidRequest."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        _room(len(request.token_ids.ids), model.info.max_context)  # before millions of them are looked at
        ids = check_token_ids("token_ids.ids", request.token_ids.ids, model.info.vocab_size)
        if not ids:
            raise InvalidRequest("is empty; give at least one token id", "token_ids.ids")
    elif kind == "text":
        ids = model.text.encode(request.text)
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


def _resumed(request: pb.GenerateRequest, model: ServedModel, n: int) -> tuple[list[int], dict[int, list[int]]]:
    """Prompt, and received ids by sequence, of a stream that goes on. Raises InvalidRequest."""
    resume, info = request.resume, model.info
    prompt = check_token_ids("resume.prompt_token_ids", resume.prompt_token_ids, info.vocab_size)
    if not prompt:
        raise InvalidRequest("is empty; give the ids of PromptInfo", "resume.prompt_token_ids")
    if request.WhichOneof("prompt") == "token_ids" and list(request.token_ids.ids) != prompt:
        raise InvalidRequest("differs from token_ids; send the request as it was", "resume.prompt_token_ids")
    received: dict[int, list[int]] = {}
    for i, state in enumerate(resume.sequences):
        if state.index >= n:
            raise InvalidRequest(
                f"[{i}] has index {state.index}; this request has {n}, counted from 0", "resume.sequences"
            )
        if state.index in received:
            raise InvalidRequest(f"[{i}] has index {state.index}, as one before it", "resume.sequences")
        field = f"resume.sequences[{i}].token_ids"
        received[state.index] = check_token_ids(field, state.token_ids, info.vocab_size)
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


def _salt(kv: pb.KvOptions, base: str) -> str:
    """The identity's salt, and within it the caller's own: nobody can name another tenant's prefixes."""
    size = len(kv.cache_salt.encode())
    if size > MAX_SALT_BYTES:
        raise InvalidRequest(f"has {size} bytes; at most {MAX_SALT_BYTES} are allowed", "kv.cache_salt")
    return f"{base}\x1f{kv.cache_salt}" if kv.cache_salt else base


def draw_seed() -> int:
    """A seed for a request that brings none."""
    return secrets.randbits(63)


def validate(
    request: pb.GenerateRequest,
    model: ServedModel,
    *,
    salt: str = "",
    infos: Sequence[EngineInfo] = (),
    draw: Callable[[], int] = draw_seed,
) -> ValidRequest:
    """The whole check, and the encoding of texts: long ones take a while. `salt` is that of the caller's identity.
    `infos` are the replicas that a stream could go on at, where they are known better than by `model.info`.

    Raises InvalidRequest or CannotResume.
    """
    info, stopping, response = model.info, request.stopping, request.response
    request_id = valid_request_id(request.request_id)
    within("priority", request.priority)
    resumed = request.HasField("resume")
    n = choosing.sequences(request.sampling)
    sampling = choosing.sampling(request.sampling, model, _seed(request, resumed, draw))
    stops = check_strings("stopping.stop", stopping.stop, MAX_STOPS, MAX_STOP_BYTES)
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"has {len(stopping.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
            "stopping.stop_token_ids",
        )
    stop_ids = check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, info.vocab_size)
    probe = choosing.probe(response, info.layers)
    grammar = grammar_of(request.format, model) if request.HasField("format") else None
    salt = _salt(request.kv, salt)
    pinned = _check_identity(request.resume, infos or (info,)) if resumed else None
    prompt, received = _resumed(request, model, n) if resumed else (_prompt(request, model), {})
    max_tokens, min_tokens = _lengths(stopping, len(prompt), info.max_context)
    for i, state in enumerate(request.resume.sequences):
        if len(state.token_ids) > max_tokens:
            raise InvalidRequest(
                f"has {len(state.token_ids)} ids, more than max_tokens, which is {max_tokens}",
                f"resume.sequences[{i}].token_ids",
            )
    return ValidRequest(
        request_id=request_id,
        model=model.name,
        prompt=prompt,
        sampling=sampling,
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_ids=[] if stopping.ignore_eos else list(model.defaults.eos_token_ids),
        stop=stops,
        stop_ids=stop_ids,
        include_stop=stopping.include_stop,
        want_token_ids=response.token_ids if response.HasField("token_ids") else True,
        logprobs=_count(response, "logprobs"),
        prompt_logprobs=_count(response, "prompt_logprobs"),
        echo=response.echo,
        probe=probe,
        grammar=grammar,
        cache_salt=salt,
        bypass_prefix_cache=request.kv.bypass_prefix_cache,
        priority=request.priority,
        received=received,
        pinned=pinned,
        fingerprint=info.model_fingerprint,
    )


def _count(response: pb.ResponseOptions, name: str) -> int | None:
    """How many logprobs; None where none are asked for."""
    return int(within(f"response.{name}", getattr(response, name))) if response.HasField(name) else None
