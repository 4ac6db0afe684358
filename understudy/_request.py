"""What the caller asked for becomes messages; messages become what the caller gets. Pure."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from understudy import errors, types
from understudy.v1 import inference_pb2 as pb

Prompt = str | Sequence[int]
Metadata = tuple[tuple[str, str], ...]


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `complete`; what is absent or None is left to the service.

    `json_schema` (JSON text, or the schema as a mapping), `regex`, `grammar`, `choice` and `json_object` say what the
    answer must match: one of them at most. `trace_candidates` and `trace_attention` (layers) say how much `trace`
    tells. Bounds and defaults are those of `proto/understudy/v1/inference.proto`, field for field. `timeout` is in
    seconds and covers everything, resumed attempts included. `traceparent` is a W3C trace context that is passed on;
    without it, that of the span that is open in the caller's OpenTelemetry, if there is one.
    """

    model: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str] | None
    seed: int | None
    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    choice: Sequence[str] | None
    json_object: bool | None
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool | None
    trace: bool | None
    trace_candidates: int | None
    trace_attention: Sequence[int] | None
    cache_salt: str | None
    bypass_prefix_cache: bool | None
    priority: int | None
    request_id: str | None
    timeout: float | None
    traceparent: str | None


_TOP = ("model", "priority", "request_id")
_GROUPS = {
    "sampling": (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "bad_words",
        "seed",
        "n",
    ),
    "stopping": ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop"),
    "format": ("json_schema", "regex", "grammar", "json_object"),
    "response": ("logprobs", "prompt_logprobs", "echo", "trace"),
    "kv": ("cache_salt", "bypass_prefix_cache"),
}
_PATHS: dict[str, tuple[str, ...]] = {name: (name,) for name in _TOP} | {
    name: (group, name) for group, names in _GROUPS.items() for name in names
}
_PATHS |= {
    "choice": ("format", "choice", "choices"),
    "trace_candidates": ("response", "trace_options", "candidates"),
    "trace_attention": ("response", "trace_options", "attention_layers"),
}
_FORMATS = (*_GROUPS["format"], "choice")
_ONE_OR_SEVERAL = ("stop", "bad_words", "choice")  # where a string alone means a list of one
_BOUNDS = {
    FieldDescriptor.TYPE_UINT32: f"0 to {2**32 - 1}",
    FieldDescriptor.TYPE_UINT64: f"0 to {2**64 - 1}",
    FieldDescriptor.TYPE_INT32: f"{-(2**31)} to {2**31 - 1}",
}
_OF_THE_CALL = ("timeout", "traceparent")


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """The message for a prompt (text or token ids) and its options.

    An option that does not exist raises TypeError, as Python does, and so does one of a wrong type; a value that
    the message cannot hold raises InvalidRequest, naming its field. Token ids are always asked for: without them a
    broken stream could not go on.
    """
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        _set(request, ("text",), prompt)
    else:
        request.token_ids.SetInParent()
        _set(request, ("token_ids", "ids"), prompt)
    _check_format(options)
    for name, value in options.items():
        if name in _OF_THE_CALL or value is None or (name == "json_object" and value is False):
            continue
        if name not in _PATHS:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if name == "json_schema" and isinstance(value, Mapping):
            value = json.dumps(value)
        elif name == "choice":
            request.format.choice.SetInParent()  # none to choose from is the service's to refuse
        _set(request, _PATHS[name], [value] if name in _ONE_OR_SEVERAL and isinstance(value, str) else value)
    request.response.token_ids = True
    # Named here and not by the server, so that an attempt that is lost before the first answer has the same name.
    request.request_id = request.request_id or uuid.uuid4().hex
    return request


def _check_format(options: GenerateOptions) -> None:
    given = [name for name in _FORMATS if options.get(name) not in (None, False)]
    if len(given) > 1:
        raise errors.InvalidRequest(f"{' and '.join(given)} are given; one of them at most says what matches", "format")


def tokenize_request(text: str, model: str | None, add_special_tokens: bool | None) -> pb.TokenizeRequest:
    """As `generate_request`."""
    request = pb.TokenizeRequest()
    _set_all(request, {"text": text, "model": model, "add_special_tokens": add_special_tokens})
    return request


def detokenize_request(
    token_ids: Sequence[int], model: str | None, skip_special_tokens: bool | None
) -> pb.DetokenizeRequest:
    """As `generate_request`."""
    request = pb.DetokenizeRequest()
    _set_all(request, {"token_ids": token_ids, "model": model, "skip_special_tokens": skip_special_tokens})
    return request


def _set_all(request: Message, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            _set(request, (name,), value)


def _set(request: Message, path: tuple[str, ...], value: Any) -> None:
    """Sets the field at `path`, whatever its shape; the error says which one did not take its value."""
    owner, name = request, path[-1]
    for part in path[:-1]:
        owner = getattr(owner, part)
    try:
        target = getattr(owner, name)
        if isinstance(value, Mapping):
            target.update(value)
        elif hasattr(target, "extend"):
            target.extend(value)
        else:
            setattr(owner, name, value)
    except TypeError as error:
        raise TypeError(f"{'.'.join(path)}: {_short(value)}: {error}") from None
    except UnicodeEncodeError as error:
        raise errors.InvalidRequest(f"not valid Unicode: {error}", ".".join(path)) from None
    except ValueError as error:
        bounds = _BOUNDS.get(owner.DESCRIPTOR.fields_by_name[name].type, str(error))
        raise errors.InvalidRequest(f"{_short(value)} does not fit: {bounds}", ".".join(path)) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def call_metadata(token: str | None, request_id: str | None = None, traceparent: str | None = None) -> Metadata:
    """What a call carries beside its message: bearer token, request id, W3C trace context."""
    pairs = {
        "authorization": f"Bearer {token}" if token else None,
        "x-request-id": request_id,
        "traceparent": traceparent or _open_span(),
    }
    for key, value in pairs.items():
        if value and not (value.isascii() and value.isprintable()):
            shown = "" if key == "authorization" else f"; got {_short(value)}"
            raise errors.InvalidRequest(f"must be printable ASCII{shown}", key)
    return tuple((key, value) for key, value in pairs.items() if value)


def _open_span() -> str | None:
    """Trace context of the span that is open in the caller's OpenTelemetry; nothing is imported for it."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    of = trace.get_current_span().get_span_context()
    return f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}" if of.is_valid else None


def prompt_info(m: pb.PromptInfo) -> types.PromptInfo:
    """Messages to values; the ones below alike."""
    return types.PromptInfo(
        request_id=m.request_id,
        model=m.model,
        model_fingerprint=m.model_fingerprint,
        numerics_id=m.numerics_id,
        prompt_token_ids=tuple(m.prompt_token_ids),
        prompt_tokens=m.prompt_tokens,
        cached_tokens=types.CachedTokens(m.cached_tokens.device, m.cached_tokens.host, m.cached_tokens.store),
        seed=m.seed,
        prompt_logprobs=tuple(_logprob(p) for p in m.prompt_logprobs),
    )


def piece(m: pb.Delta) -> types.Piece:
    return types.Piece(
        text=m.text,
        token_ids=tuple(m.token_ids),
        logprobs=tuple(_logprob(p) for p in m.logprobs),
        index=m.index,
        trace=_trace(m.trace) if m.HasField("trace") else None,
        echo=m.echo,
    )


def _trace(m: pb.Trace) -> types.Trace:
    return types.Trace(m.server_us, m.step, tuple(_token_trace(t) for t in m.tokens))


def _token_trace(m: pb.TokenTrace) -> types.TokenTrace:
    return types.TokenTrace(
        token_id=m.token_id,
        candidates=tuple(types.Candidate(c.token_id, c.text, c.before, c.after) for c in m.candidates),
        experts=tuple(types.ExpertChoice(e.layer, tuple(e.experts), tuple(e.weights)) for e in m.experts),
        attention=tuple(types.Attention(a.layer, a.start, tuple(a.weights)) for a in m.attention),
    )


def _logprob(m: pb.Logprob) -> types.Logprob:
    top = tuple(types.TopLogprob(t.token_id, t.text, t.logprob) for t in m.top)
    return types.Logprob(m.token_id, m.text, m.logprob, m.rank, top)


def finish(m: pb.Finish) -> types.Finish:
    which = m.WhichOneof("matched")
    return types.Finish(
        index=m.index,
        reason=_reason(m.reason),
        matched=getattr(m, which) if which else None,
        usage=types.Usage(m.usage.prompt_tokens, m.usage.completion_tokens, m.usage.reasoning_tokens),
    )


def _reason(number: int) -> types.FinishReason:
    try:
        return types.FinishReason(pb.FinishReason.Name(number))
    except ValueError:
        raise errors.InternalError(
            f"the service gave finish reason {number}, which this client does not know"
        ) from None


def tokens(m: pb.TokenizeResponse) -> types.Tokens:
    return types.Tokens(tuple(m.token_ids), tuple(m.texts), m.max_context)


def model(m: pb.Model) -> types.Model:
    return types.Model(
        name=m.name,
        model_fingerprint=m.model_fingerprint,
        numerics_id=m.numerics_id,
        max_context=m.max_context,
        vocab_size=m.vocab_size,
        dtype=m.dtype,
        architecture=m.architecture,
        eos_token_ids=tuple(m.eos_token_ids),
    )


def models(m: pb.ListModelsResponse) -> list[types.Model]:
    return [model(entry) for entry in m.models]
