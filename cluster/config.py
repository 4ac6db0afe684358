"""One configuration from three places: flags win over `UNDERSTUDY_*` in the environment, that over a YAML file.

`load` is the only way in. It knows every key, says for each value where it came from, and answers anything unknown,
out of bounds or contradictory with a ConfigError that names the key, the value and the way out.

In the file, `models:` gives each model its own section; a key that a section lacks comes from the top level. A flag or
a variable of the environment wins over every section.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cluster.written import Bounds, Loader, Replicas, parse_size
from understudy.errors import ConfigError
from workers.cache.wire import check_url, shown_url
from workers.engine.speculate import MAX_DRAFT_TOKENS
from workers.parallel.share import MOST_RANKS

ENV_PREFIX = "UNDERSTUDY_"
# What Kubernetes writes into every pod for a Service named "understudy", and what others read.
_FOREIGN_ENV = re.compile(
    r"^UNDERSTUDY_(SERVICE_.*|PORT_\d+.*|ORACLES|ADDRESS|ADMIN|TOKEN|INSTANCE|KERNELS?(_.*)?|ISA|CACHE(_.*)?)$"
)


def _device(value: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ValueError("is not a device; write cpu, cuda or cuda:N")
    return value


def _redis_url(value: str) -> str:
    if value != "none":
        check_url(value)
    return value


def _otlp_endpoint(value: str) -> str:
    try:
        url = urlsplit(value)
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port is not None
    except ValueError:
        good = False
    if not good:
        raise ValueError("is not an OTLP gRPC endpoint; write http://HOST:4317, or https:// for TLS")
    return value


def _model_name(value: str) -> str:
    if not 0 < len(value) <= 128 or not value.isprintable() or any(c.isspace() for c in value):
        raise ValueError("is not a name; write NAME=DIR with at most 128 printable characters and no spaces")
    return value


def _absolute(value: Path) -> Path:
    """Whoever reads the file may work in another directory."""
    return value.expanduser().absolute()


FilePath = Annotated[Path, AfterValidator(_absolute)]
Size = Annotated[int, Field(ge=1 << 20), BeforeValidator(parse_size)]
MaybeSize = Annotated[int, Field(ge=0), BeforeValidator(parse_size)]
Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class _Sizes(BaseModel):
    """Keys that a model may have of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    dtype: Dtype = "auto"
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    max_context: Annotated[int, Field(ge=1)] | None = None
    cache_bytes: Size | None = None
    host_cache_bytes: MaybeSize | None = None
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    max_running: Annotated[int, Field(ge=1)] | None = None
    threads: Annotated[int, Field(ge=1)] | None = None
    speculate: Literal["auto", "none", "ngram", "draft"] = "auto"
    draft_model: FilePath | None = None
    draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = 4
    tensor_parallel: Annotated[int, Field(ge=1, le=MOST_RANKS)] = 1
    expert_parallel: bool = False
    tensor_parallel_invariant: bool = False
    expert_hosts: Annotated[int, Field(ge=0, le=4096)] = 0
    replicas: Replicas = Bounds(1, 1)
    target_first_token: Annotated[float, Field(ge=0.05, le=3600)] = 2.0
    idle_seconds: Annotated[float, Field(ge=1, le=7 * 86400)] = 300.0
    scale_down_seconds: Annotated[float, Field(ge=1, le=86400)] = 60.0
    surge_percent: Annotated[int, Field(ge=0, le=100)] = 25


class ModelConfig(_Sizes):
    """One model to serve: a checkpoint's directory, the name that clients use, and its sizes."""

    name: Annotated[str, AfterValidator(_model_name)]
    path: Path


class ServiceConfig(BaseModel):
    """Everything that `understudy serve` can be told, valid and free of contradictions.

    `models` is what is served, resolved; `notes` are warnings for the console. Sizes are bytes, times seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    models: tuple[ModelConfig, ...]
    host: str = "127.0.0.1"
    port: Port = 50051
    gateways: Annotated[int, Field(ge=1, le=256)] = 1
    admin_port: Port = 50052
    metrics_port: Port = 9464
    metrics_host: str = "127.0.0.1"
    tls_cert: FilePath | None = None
    tls_key: FilePath | None = None
    tls_client_ca: FilePath | None = None
    tokens: FilePath | None = None
    insecure: bool = False
    max_streams: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    # gRPC counts messages in 32 bits, and is given twice this much so that a refusal can be one of ours.
    max_message_bytes: Annotated[int, Field(ge=1 << 16, le=512 << 20), BeforeValidator(parse_size)] = 16 << 20
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    max_queued_tokens: Annotated[int, Field(ge=1)] = 1 << 20
    max_service_queue: Annotated[int, Field(ge=1)] | None = None
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    heartbeat_timeout: Annotated[float, Field(ge=0.5, le=600)] = 2.0
    step_timeout: Annotated[float, Field(ge=5, le=86400)] = 60.0
    cold_start_seconds: Annotated[float, Field(ge=0, le=86400)] = 300.0
    redis_url: Annotated[str, AfterValidator(_redis_url)] | None = None
    redis_bytes: Size | None = None
    store_key: FilePath | None = None
    wire_key: FilePath | None = None
    ray_address: str | None = None
    place_by_role: bool = False
    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = None
    verbose: bool = False
    # Not for users: which engine answers. "fake" makes tokens without computing, to measure everything around it.
    engine: Literal["real", "fake"] = "real"
    fake_rows: Annotated[float, Field(gt=0)] | None = None  # a second, that the fake engine takes time for
    notes: tuple[str, ...] = ()


_SIZE_KEYS = tuple(_Sizes.model_fields)
_TOP_KEYS = tuple(k for k in ServiceConfig.model_fields if k not in ("models", "notes"))
_KEYS = (*_TOP_KEYS, *_SIZE_KEYS, "model")


def load(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    tree: Mapping[str, object] | None = None,
) -> ServiceConfig:
    """Puts the layers together. `flags` holds those that were given, by key; `model` is a list of `[NAME=]DIR`. `tree`
    is what a file would hold, where there is none.

    Raises ConfigError.
    """
    notes: list[str] = []
    given = {k: v for k, v in (flags or {}).items() if v is not None and v != []}
    for key, value in given.items():
        _known(key, _KEYS, "--" + key.replace("_", "-"), value)
    strong = _from_environment(environ or {}, notes) | given
    where = {k: "--" + k.replace("_", "-") if k in given else ENV_PREFIX + k.upper() for k in strong}
    origin = str(file) if file is not None else "the arguments"
    if file is not None:
        tree = _read_file(file)
    weak, sections = _from_tree(tree or {}, origin)
    where |= {k: f"{k} (in {origin})" for k in weak if k not in strong}
    flat = weak | strong
    models = _models(strong, weak, sections, where)
    values = {k: v for k, v in flat.items() if k in _TOP_KEYS}
    try:
        config = ServiceConfig.model_validate({**values, "models": models, "notes": tuple(notes)})
    except ValidationError as error:
        raise _readable(error, where) from error
    _check(config, where)
    return config


def bundled_model() -> Path:
    """The checkpoint that comes along: beside the rooms in a clone, under `share/` where installed."""
    schemes = [sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")]  # `pip install --user`
    data = [Path(sysconfig.get_path("data", scheme)) / "share" / "understudy" for scheme in schemes]
    places = [root / "models" / "demo" for root in (Path(__file__).resolve().parent.parent, *data)]
    for place in places:
        if (place / "config.json").is_file():
            return place
    looked = " nor at ".join(map(str, dict.fromkeys(places)))
    raise ConfigError(f"--model: not given, and the bundled model is not at {looked}; name a checkpoint's directory")


def _known(key: str, keys: Sequence[str], shown: str, value: object) -> None:
    if key in keys:
        return
    near = difflib.get_close_matches(key.replace("-", "_"), keys, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(keys))}"
    raise ConfigError(f"{shown} = {value!r}: unknown key; {hint}")


def _from_environment(environ: Mapping[str, str], notes: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in sorted(n for n, value in environ.items() if value):  # an empty one is one that is not set
        if not name.startswith(ENV_PREFIX):
            continue
        if "://" in environ[name] and name == ENV_PREFIX + "PORT":
            continue  # Kubernetes' link to a Service of that name, not a port of ours
        key = name[len(ENV_PREFIX) :].lower()
        if key not in _KEYS and _FOREIGN_ENV.match(name):
            continue
        if key in _KEYS:
            value = environ[name]
            found[key] = [v for v in value.split(",") if v] if key == "model" else value
        elif near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.75):
            raise ConfigError(f"{name} = {environ[name]!r}: unknown key; did you mean {ENV_PREFIX}{near[0].upper()}?")
        else:
            notes.append(f"{name} in the environment is no key of this service and is ignored")
    return found


def _read_file(file: Path) -> dict[str, object]:
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"--config {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file}: is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {file}: holds a {type(tree).__name__}; write one key per line, such as port: 50051"
        )
    return tree


def _from_tree(tree: Mapping[str, object], file: str) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Top-level keys, and the sections of `models` by name. `file` is where they stand, for the errors."""
    flat = {str(k).replace("-", "_"): v for k, v in tree.items() if v is not None}
    sections = flat.pop("models", {})
    for key, value in flat.items():
        _known(key, (*_KEYS, "models"), f"{key} (in {file})", value)
    if sections and "model" in flat:
        raise ConfigError(f"model and models (in {file}) contradict each other; keep models")
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise ConfigError(f"models (in {file}): write a section per model, such as models: {{demo: {{path: DIR}}}}")
    if isinstance(flat.get("model"), str):
        flat["model"] = [flat["model"]]
    for name, section in sections.items():
        for key, value in section.items():
            _known(str(key).replace("-", "_"), (*_SIZE_KEYS, "path"), f"models.{name}.{key} (in {file})", value)
    return flat, {str(n): {str(k).replace("-", "_"): v for k, v in s.items()} for n, s in sections.items()}


def _models(
    strong: Mapping[str, object],
    weak: Mapping[str, object],
    sections: Mapping[str, dict[str, object]],
    where: Mapping[str, str],
) -> tuple[ModelConfig, ...]:
    """Each model with its values: flag or environment, else its section, else the file's top level, else default."""
    named: dict[str, Path] = {}
    entries = strong.get("model", weak.get("model"))
    if entries is not None:
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            name, path = _name_and_path(str(entry), where["model"])
            if name in named:
                raise ConfigError(f"{where['model']} = {entry!r}: the name {name!r} is taken; write ANOTHER=DIR")
            named[name] = path
    else:
        for name, section in sections.items():
            if "path" not in section:
                raise ConfigError(f"models.{name}: has no path; add the checkpoint's directory as path: DIR")
            named[name] = Path(str(section["path"]))
    if not named:
        named["demo"] = bundled_model()
    models = []
    for name, path in named.items():
        own = sections.get(name, {})
        values = {k: v for k, v in weak.items() if k in _SIZE_KEYS} | own
        values |= {k: v for k, v in strong.items() if k in _SIZE_KEYS} | {"path": path.expanduser()}
        labels = dict(where) | {k: f"models.{name}.{k}" for k in own if k not in strong}
        try:
            model = ModelConfig.model_validate({**values, "name": name})
        except ValidationError as error:
            raise _readable(error, labels) from error
        _check_directory(model)
        _check_draft(model, labels)
        _check_experts(model, labels)
        _check_parallel(model, labels)
        models.append(model)
    return tuple(models)


def _name_and_path(entry: str, where: str) -> tuple[str, Path]:
    """`DIR` or `NAME=DIR`; a directory that is there may have an equals sign in its own name."""
    name, found, rest = entry.partition("=")
    if not found or Path(entry).expanduser().is_dir():
        path = Path(entry)
        return path.expanduser().resolve().name, path
    if not name or not rest:
        raise ConfigError(f"{where} = {entry!r}: write DIR or NAME=DIR")
    return name, Path(rest)


def _check_directory(model: ModelConfig) -> None:
    if not model.path.is_dir():
        raise ConfigError(f"--model {model.path}: no such directory; give one that holds a Hugging Face checkpoint")
    if not (model.path / "config.json").is_file():
        raise ConfigError(f"--model {model.path}: has no config.json; give a directory that holds a checkpoint")


def _check_draft(model: ModelConfig, labels: Mapping[str, str]) -> None:
    """Whether there is a draft model where one is used; one that is switched off by `none` may be there."""
    speculate, draft = labels.get("speculate", "--speculate"), labels.get("draft_model", "--draft-model")
    if model.draft_model is None:
        if model.speculate == "draft":
            raise ConfigError(f"{speculate} = 'draft': needs {draft}; or choose ngram, which needs no model")
    elif model.speculate == "ngram":
        raise ConfigError(
            f"{draft} = '{model.draft_model}': is not used with {speculate} = 'ngram'; leave one of them out"
        )
    elif not (model.draft_model / "config.json").is_file():
        raise ConfigError(
            f"{draft} = '{model.draft_model}': has no config.json; give a directory that holds a checkpoint"
        )


def _check_experts(model: ModelConfig, labels: Mapping[str, str]) -> None:
    """Whether the model has experts for so many hosts. Raises ConfigError, or CheckpointError of its config.json."""
    if model.expert_hosts:
        from workers.experts.limits import check_hosts
        from workers.model.config import read_spec

        check_hosts(read_spec(model.path), model.expert_hosts, labels.get("expert_hosts", "--expert-hosts"))


def _check_parallel(model: ModelConfig, labels: Mapping[str, str]) -> None:
    """Whether so many ranks can share the model. Raises ConfigError, or CheckpointError of its config.json."""
    whole = labels.get("expert_parallel", "--expert-parallel")
    if model.expert_parallel and model.expert_hosts:
        hosts = labels.get("expert_hosts", "--expert-hosts")
        raise ConfigError(f"{whole}: the experts live on {hosts} = {model.expert_hosts} already; keep one of the two")
    if model.tensor_parallel == 1 and not model.tensor_parallel_invariant:
        if model.expert_parallel:
            raise ConfigError(f"{whole}: spreads experts over ranks, of which there is one; add --tensor-parallel N")
        return
    from workers.model.config import read_spec
    from workers.parallel.share import check_degree

    key = labels.get("tensor_parallel", "--tensor-parallel")
    spread = model.expert_parallel or model.expert_hosts > 0
    check_degree(read_spec(model.path), model.tensor_parallel, model.tensor_parallel_invariant, spread, key)


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(config: ServiceConfig, where: Mapping[str, str]) -> None:
    """Contradictions between keys."""

    def label(key: str) -> str:
        return where.get(key, "--" + key.replace("_", "-"))

    for key in ("tls_cert", "tls_key", "tls_client_ca", "tokens", "store_key", "wire_key"):
        path = getattr(config, key)
        if path is not None and not path.is_file():
            raise ConfigError(f"{label(key)} = {str(path)!r}: no such file")
    if (config.tls_cert is None) != (config.tls_key is None):
        here, missing = ("tls_cert", "tls_key") if config.tls_key is None else ("tls_key", "tls_cert")
        raise ConfigError(f"{label(here)} = {str(getattr(config, here))!r}: needs {label(missing)} as well")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError(f"{label('tls_client_ca')} = {str(config.tls_client_ca)!r}: needs --tls-cert and --tls-key")
    if not is_loopback(config.host) and not config.insecure:
        shown = f"{label('host')} = {config.host!r}: others can reach it"
        if config.tls_cert is None:
            raise ConfigError(f"{shown}, so it needs --tls-cert and --tls-key; or listen on 127.0.0.1")
        if config.tokens is None and config.tls_client_ca is None:
            raise ConfigError(f"{shown}, so it needs --tokens or --tls-client-ca; or listen on 127.0.0.1")
    ports = [(k, getattr(config, k)) for k in ("port", "admin_port", "metrics_port") if getattr(config, k)]
    for i, (key, port) in enumerate(ports):
        for other, same in ports[:i]:
            if port == same:
                raise ConfigError(f"{label(key)} = {port}: {label(other)} has that port already; choose another")


def _readable(error: ValidationError, where: Mapping[str, str]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    shown = where.get(key, "--" + key.replace("_", "-"))
    said = first["msg"].removeprefix("Value error, ")
    said = said[0].lower() + said[1:]
    value = shown_url(str(first["input"])) if key == "redis_url" else first["input"]  # no password in a message
    return ConfigError(f"{shown} = {value!r}: {said}")
