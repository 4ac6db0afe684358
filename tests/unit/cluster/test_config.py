"""Every key, from every place; every mistake, with its way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import config as module
from cluster.config import is_loopback, load, parse_size
from cluster.plan import make_plan
from understudy.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "llama"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_(tree: object) -> Path:
        path = tmp_path / "service.yaml"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))  # JSON is YAML
        return path

    return write_


def test_defaults(model: Path) -> None:
    config = load({"model": [str(model)]})
    assert (config.host, config.port, config.admin_port, config.metrics_port) == ("127.0.0.1", 50051, 50052, 9464)
    assert (config.gateways, config.drain_seconds, config.heartbeat_timeout) == (1, 30, 2)
    assert (config.max_streams, config.max_message_bytes) == (4096, 16 << 20)
    assert (config.max_queue, config.max_queued_tokens) == (256, 1 << 20)
    (served,) = config.models
    assert (served.name, served.path, served.replicas, served.dtype) == ("llama", model, (1, 1), "auto")
    assert config.notes == ()


def test_flags_win_over_environment_over_file(model: Path, write: Any) -> None:
    file = write({"model": str(model), "port": 1001, "gateways": 2, "drain_seconds": 5, "heartbeat_timeout": 3})
    config = load({"port": 3003}, {"UNDERSTUDY_PORT": "2002", "UNDERSTUDY_GATEWAYS": "4"}, file)
    assert (config.port, config.gateways, config.drain_seconds, config.heartbeat_timeout) == (3003, 4, 5, 3)


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_local_experts": 3, "num_experts_per_tok": 1, "torch_dtype": "float32",
}  # fmt: skip


def test_ranks_that_can_share_a_model(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(MIXTRAL))

    def served(**flags: object) -> Any:
        return load({"model": [str(model)]} | flags).models[0]

    assert served(tensor_parallel="4").tensor_parallel == 4
    assert served(tensor_parallel="2", expert_parallel=True).expert_parallel
    assert served(tensor_parallel_invariant=True).tensor_parallel_invariant
    (plan,) = make_plan_of(load({"model": [str(model)], "tensor_parallel": "2"}), cpus=4)
    assert (plan.engine.tensor_parallel, plan.engine.threads) == (2, 2)
    for flags, words in (
        ({"tensor_parallel": "3"}, r"--tensor-parallel: 3 ranks .* 4 query heads .* work: 1, 2, 4"),
        ({"tensor_parallel": "4", "expert_parallel": True}, r"3 experts, fewer than ranks; .* work: 1, 2"),
        ({"tensor_parallel": "17"}, r"--tensor-parallel = '17': input should be less than or equal to 16"),
        ({"expert_parallel": True}, r"--expert-parallel: .* add --tensor-parallel N"),
        ({"tensor_parallel": "2", "expert_parallel": True, "expert_hosts": "2"}, r"keep one of the two"),
    ):
        with pytest.raises(ConfigError, match=words):
            served(**flags)


def make_plan_of(config: Any, cpus: int) -> Any:
    (path,) = [m.path for m in config.models]
    (path / "tokenizer.json").write_text("{}")
    return make_plan(config, cpus).replicas


def test_each_model_has_its_section(model: Path, write: Any) -> None:
    tree = {
        "replicas": 2,
        "dtype": "float16",
        "models": {
            "a": {"path": str(model), "replicas": 3, "cache-bytes": "2GiB"},
            "b": {"path": str(model), "dtype": "float32"},
        },
    }
    a, b = load({}, {}, write(tree)).models
    assert (a.name, a.replicas, a.dtype, a.cache_bytes) == ("a", (3, 3), "float16", 2 << 30)
    assert (b.name, b.replicas, b.dtype, b.cache_bytes) == ("b", (2, 2), "float32", None)
    a, b = load({"replicas": "1"}, {"UNDERSTUDY_DTYPE": "bfloat16"}, write(tree)).models
    assert {(m.replicas, m.dtype) for m in (a, b)} == {((1, 1), "bfloat16")}, (
        "a flag or variable wins over every section"
    )
    (only,) = load({"model": [f"a={model}"]}, {}, write(tree)).models
    assert (only.name, only.replicas) == ("a", (3, 3)), "a named model keeps its section"


@pytest.mark.parametrize(
    ("written", "bounds"),
    [("2", (2, 2)), ("0:4", (0, 4)), ("1:4", (1, 4)), ("10:59", (10, 59)), ("'3:3'", (3, 3)), ("1:1000", (1, 1000))],
)
def test_replicas_between_bounds_are_no_number_of_base_60(
    model: Path, write: Any, written: str, bounds: tuple[int, int]
) -> None:
    file = write(f"models:\n  a:\n    path: {model}\n    replicas: {written}\n    idle_seconds: 5\n")
    (a,) = load({}, {}, file).models
    assert (a.replicas, a.idle_seconds) == (bounds, 5)
    assert (a.replicas.fixed, a.replicas.first) == (bounds[0] == bounds[1], max(1, bounds[0]))
    (b,) = load({"replicas": written.strip("'")}, {}, file).models
    assert b.replicas == bounds


def test_drafts_of_each_model(model: Path, write: Any) -> None:
    (model / "tokenizer.json").write_text("{}")
    tree = {
        "draft-model": str(model),
        "models": {
            "a": {"path": str(model), "draft_tokens": 7},
            "b": {"path": str(model), "speculate": "none"},
        },
    }
    config = load({}, {}, write(tree))
    a, b = (replica.engine for replica in make_plan(config, 2).replicas)
    assert (a.speculate, a.draft_model_dir, a.draft_tokens) == ("draft", str(model), 7)
    assert (b.speculate, b.draft_model_dir, b.draft_tokens) == ("none", None, 4)
    (lookup,) = make_plan(load({"model": [str(model)]}, {"UNDERSTUDY_SPECULATE": "ngram"}), 2).replicas
    assert (lookup.engine.speculate, lookup.engine.draft_model_dir) == ("ngram", None)
    (without,) = make_plan(load({"model": [str(model)]}), 2).replicas
    assert without.engine.speculate == "none"


def test_expert_hosts_are_for_models_with_experts(demo_model: Path) -> None:
    demo = {"model": [str(demo_model)]}
    (plan,) = make_plan(load(demo | {"expert_hosts": 2, "threads": 4}), 4).replicas
    assert (plan.expert_hosts, plan.host_threads, plan.engine.experts) == (2, 2, None)
    (alone,) = make_plan(load(demo, {"UNDERSTUDY_EXPERT_HOSTS": "0"}), 4).replicas
    assert alone.expert_hosts == 0
    with pytest.raises(ConfigError, match=r"UNDERSTUDY_EXPERT_HOSTS = 99: .* has 8 experts in a layer.*at most 8"):
        load(demo, {"UNDERSTUDY_EXPERT_HOSTS": "99"})
    with pytest.raises(ConfigError, match=r"--expert-hosts = -1"):
        load(demo | {"expert_hosts": -1})


def test_spans_go_where_gateways_and_replicas_are_told(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    plan = make_plan(load({"model": [str(model)]}, {"UNDERSTUDY_OTLP_ENDPOINT": "https://[::1]:4317"}), 2)
    assert plan.gateway.config.otlp_endpoint == plan.replicas[0].otlp_endpoint == "https://[::1]:4317"
    assert make_plan(load({"model": [str(model)]}), 2).replicas[0].otlp_endpoint is None


def test_several_models_by_name(model: Path) -> None:
    config = load({"model": [str(model), f"other={model}"]})
    assert [m.name for m in config.models] == ["llama", "other"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prot": 1}, ["--prot", "1", "did you mean port?"]),
        ({"frobnicate": 1}, ["--frobnicate", "unknown key", "known are"]),
        ({"port": 70000}, ["--port", "70000", "65535"]),
        ({"gateways": 0}, ["--gateways", "0", "greater than or equal to 1"]),
        ({"cache_bytes": "4Gx"}, ["--cache-bytes", "4Gx", "4GiB"]),
        ({"cache_bytes": "12"}, ["--cache-bytes", "12", "1048576"]),
        ({"dtype": "float8"}, ["--dtype", "float8", "bfloat16"]),
        ({"device": "gpu"}, ["--device", "gpu", "cuda"]),
        ({"replicas": "many"}, ["--replicas", "many", "write N, or MIN:MAX"]),
        ({"replicas": "4:1"}, ["--replicas", "4:1", "out of bounds", "MIN from 0"]),
        ({"replicas": "0"}, ["--replicas", "'0'", "out of bounds"]),
        ({"replicas": "0:2000"}, ["--replicas", "0:2000", "up to 1000"]),
        ({"target_first_token": 0}, ["--target-first-token", "0", "0.05"]),
        ({"surge_percent": 101}, ["--surge-percent", "101", "100"]),
        ({"max_running": 0}, ["--max-running", "0"]),
        ({"speculate": "maybe"}, ["--speculate", "maybe", "ngram"]),
        ({"speculate": "draft"}, ["--speculate", "draft", "--draft-model", "ngram"]),
        ({"draft_model": "/nowhere"}, ["--draft-model", "/nowhere", "config.json"]),
        ({"draft_model": "/x", "speculate": "ngram"}, ["--draft-model", "/x", "--speculate", "leave one"]),
        ({"draft_tokens": 0}, ["--draft-tokens", "0", "1"]),
        ({"draft_tokens": 65}, ["--draft-tokens", "65", "64"]),
        ({"heartbeat_timeout": 0.1}, ["--heartbeat-timeout", "0.1", "0.5"]),
        ({"max_streams": 0}, ["--max-streams", "0", "1"]),
        ({"otlp_endpoint": "127.0.0.1:4317"}, ["--otlp-endpoint", "127.0.0.1:4317", "http://HOST:4317"]),
        ({"otlp_endpoint": "http://collector"}, ["--otlp-endpoint", "http://collector", "http://HOST:4317"]),
        ({"max_message_bytes": "1KiB"}, ["--max-message-bytes", "1024", "65536"]),
        ({"max_message_bytes": "1GiB"}, ["--max-message-bytes", "536870912"]),
        ({"max_queue": 0}, ["--max-queue", "0", "1"]),
        ({"max_queued_tokens": -1}, ["--max-queued-tokens", "-1", "1"]),
        ({"host": "0.0.0.0"}, ["--host", "0.0.0.0", "--tls-cert", "127.0.0.1"]),
        ({"port": 4, "admin_port": 4}, ["--admin-port", "4", "--port"]),
        ({"tls_cert": Path("/nowhere")}, ["--tls-cert", "/nowhere", "no such file"]),
        ({"tokens": Path("/nowhere")}, ["--tokens", "/nowhere", "no such file"]),
        ({"model": ["/nowhere"]}, ["--model", "/nowhere", "no such directory"]),
        ({"model": ["=x"]}, ["--model", "=x", "NAME=DIR"]),
    ],
)
def test_a_wrong_flag_is_named_with_its_value_and_a_way_out(
    model: Path, flags: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"model": [str(model)]} | flags)
    for word in words:
        assert word in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"prot": 1}, ["prot", "service.yaml", "did you mean port?"]),
        ({"port": "x"}, ["port (in", "'x'", "integer"]),
        ({"models": {"a": {"path": "/x", "replica": 2}}}, ["models.a.replica", "did you mean replicas?"]),
        ({"models": {"a": {"replicas": 2}}}, ["models.a", "path"]),
        ({"models": ["a"]}, ["models", "section"]),
        ({"model": "/x", "models": {"a": {"path": "/x"}}}, ["model", "models", "contradict"]),
        ("- 1\n- 2\n", ["list", "one key per line"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_a_wrong_key_in_the_file_is_named(write: Any, tree: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, {}, write(tree))
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_an_empty_file_is_no_mistake_and_a_missing_one_is(model: Path, write: Any, tmp_path: Path) -> None:
    assert load({"model": [str(model)]}, {}, write("")).port == 50051
    with pytest.raises(ConfigError, match="cannot be read"):
        load({}, {}, tmp_path / "absent.yaml")


def test_a_wrong_value_in_a_section_names_the_section(model: Path, write: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.a\.dtype = 'float8'"):
        load({}, {}, write({"models": {"a": {"path": str(model), "dtype": "float8"}}}))


def test_the_environment(model: Path) -> None:
    base = {"UNDERSTUDY_MODEL": f"x={model},y={model}"}
    assert [m.name for m in load({}, base).models] == ["x", "y"]
    with pytest.raises(ConfigError, match=r"UNDERSTUDY_PROT = '1'.*UNDERSTUDY_PORT"):
        load({}, base | {"UNDERSTUDY_PROT": "1"})
    with pytest.raises(ConfigError, match="UNDERSTUDY_PORT = 'high'"):
        load({}, base | {"UNDERSTUDY_PORT": "high"})
    noted = load({}, base | {"UNDERSTUDY_COLOUR": "red"})
    assert "UNDERSTUDY_COLOUR" in noted.notes[0]
    bare = load({}, base | {"UNDERSTUDY_TOKENS": "", "UNDERSTUDY_ISA": "amx"})
    assert (bare.tokens, bare.notes) == (None, ()), "empty is unset; the kernels' own variable is known"
    linked = {"UNDERSTUDY_PORT": "tcp://10.0.0.1:50051", "UNDERSTUDY_SERVICE_HOST": "10.0.0.1"}
    config = load({}, base | linked | {"UNDERSTUDY_PORT_50051_TCP": "tcp://10.0.0.1:50051"})
    assert (config.port, config.notes) == (50051, ()), "what Kubernetes says of a Service is not ours"


def test_every_key_can_come_from_the_environment(model: Path) -> None:
    """`UNDERSTUDY_CACHE_BYTES` looks like the client's and the kernels' variables, which are left alone."""
    given = {"UNDERSTUDY_CACHE_BYTES": "1GiB", "UNDERSTUDY_CACHE": "/x", "UNDERSTUDY_KERNEL_CACHE": "/y"}
    config = load({"model": [str(model)]}, given)
    assert (config.models[0].cache_bytes, config.notes) == (1 << 30, ())


def test_a_directory_may_have_an_equals_sign(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = model.rename(model.with_name("lr=3e-4"))
    assert [(m.name, m.path) for m in load({"model": [str(odd)]}).models] == [("lr=3e-4", odd)]
    assert [(m.name, m.path) for m in load({"model": [f"x={odd}"]}).models] == [("x", odd)]


@pytest.mark.parametrize("name", ["two words", "tab\t", "x" * 129, "line\nbreak"])
def test_a_name_that_nobody_could_ask_for_is_refused(model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name; write NAME=DIR"):
        load({"model": [f"{name}={model}"]})


def test_files_are_found_from_any_working_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text("t tenant\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("tokens", "~/tokens"):
        assert load({"model": [model.name], "tokens": written}).tokens == tmp_path / "tokens"


def test_two_models_of_one_name(model: Path) -> None:
    with pytest.raises(ConfigError, match="'llama' is taken"):
        load({"model": [str(model), str(model)]})


def test_a_directory_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load({"model": [str(tmp_path)]})


def test_the_bundled_model_is_the_default(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bundled_model", lambda: model)
    (served,) = load().models
    assert (served.name, served.path) == ("demo", model)


def test_the_bundled_model_is_found_where_a_wheel_puts_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "cluster" / "config.py"))
    monkeypatch.setattr(module.sysconfig, "get_path", lambda _name, _scheme: str(tmp_path / "prefix"))
    place = tmp_path / "prefix" / "share" / "understudy" / "models" / "demo"
    with pytest.raises(ConfigError, match=rf"--model: not given.*site-packages/models/demo nor at {place};"):
        module.bundled_model()
    place.parent.mkdir(parents=True)
    model.rename(place)
    assert module.bundled_model() == place


def test_tls_goes_together_and_strangers_need_a_name(model: Path, tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("x")
    base = {"model": [str(model)]}
    with pytest.raises(ConfigError, match=r"--tls-cert.*needs --tls-key"):
        load(base | {"tls_cert": pem})
    with pytest.raises(ConfigError, match=r"--tls-key.*needs --tls-cert"):
        load(base | {"tls_key": pem})
    with pytest.raises(ConfigError, match=r"--tls-client-ca.*needs"):
        load(base | {"tls_client_ca": pem})
    pair = base | {"tls_cert": pem, "tls_key": pem, "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="needs --tokens or --tls-client-ca"):
        load(pair)
    assert load(pair | {"tokens": pem}).host == "0.0.0.0"
    assert load(pair | {"tls_client_ca": pem}).host == "0.0.0.0"
    with pytest.raises(ConfigError, match=r"--tls-cert"):
        load(base | {"host": "example.org", "tokens": pem})


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@given(
    st.integers(1, 10**6), st.sampled_from([("", 1), ("KiB", 1 << 10), ("mib", 1 << 20), (" GB", 10**9), ("t", 10**12)])
)
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]
    assert parse_size(number) == number


def test_half_a_gibibyte() -> None:
    assert parse_size("0.5GiB") == 1 << 29
