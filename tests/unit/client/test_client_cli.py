"""The command line: in this process through Typer's runner, and as a program against a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from understudy import errors
from understudy.cli import explain, main
from understudy.cli.bench import percentile
from understudy.cli.common import message_dict
from understudy.testing import FakeServer
from understudy.v1 import admin_pb2

TEXT = "Hello, world"


def run(*args: str, address: str | None = None, **kwargs: Any) -> Result:
    env = {"UNDERSTUDY_ADDRESS": address, "UNDERSTUDY_ADMIN": address, "UNDERSTUDY_TOKEN": None, "COLUMNS": "200"}
    return CliRunner().invoke(main.app, args, env=env, **kwargs)


def program(*args: str, **kwargs: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("UNDERSTUDY_")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    code = "from understudy.cli.main import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, env=env, **pipes)


def test_complete_prints_the_answer_and_nothing_else(server: FakeServer) -> None:
    done = run("complete", "Hi", address=server.address)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{TEXT}\n", "")
    assert run("complete", "Hi", "--no-stream", address=server.address).stdout == f"{TEXT}\n"


def test_complete_adds_no_second_line_end() -> None:
    with FakeServer("line\n") as server:
        assert run("complete", "Hi", address=server.address).stdout == "line\n"


def test_every_flag_of_complete_reaches_the_service(server: FakeServer) -> None:
    flags = (
        "--model fake --temperature 0.5 --top-k 7 --top-p 0.75 --min-p 0.25 --seed 18446744073709551615 --max-tokens 9 "
        "--min-tokens 2 --stop x --stop y --stop-token-id 3 --stop-token-id 4 --ignore-eos --include-stop --logprobs 1 "
        "--cache-salt s --bypass-prefix-cache --priority -3 --request-id mine --token secret --n 2 "
        "--repetition-penalty 1.5 --presence-penalty -0.5 --frequency-penalty 0.25 --logit-bias 5=1.5 "
        "--logit-bias 6=-100 --bad-word a --bad-word b --regex x+ --explain --candidates 3 --attention 0 --attention 2 "
        "--prompt-logprobs 1 --echo"
    )
    assert run("complete", "Hi", *flags.split(), address=server.address).exit_code == 0
    call = server.calls[0]
    expected = {
        "request_id": "mine",
        "model": "fake",
        "text": "Hi",
        "sampling": {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.25, "seed": 2**64 - 1}
        | {"n": 2, "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.25}
        | {"logit_bias": {5: 1.5, 6: -100}, "bad_words": ["a", "b"]},
        "stopping": {
            "max_tokens": 9,
            "min_tokens": 2,
            "stop": ["x", "y"],
            "stop_token_ids": [3, 4],
            "ignore_eos": True,
            "include_stop": True,
        },
        "response": {"token_ids": True, "logprobs": 1, "prompt_logprobs": 1, "echo": True, "trace": True}
        | {"trace_options": {"candidates": 3, "attention_layers": [0, 2]}},
        "format": {"regex": "x+"},
        "kv": {"cache_salt": "s", "bypass_prefix_cache": True},
        "priority": -3,
    }
    assert call.message == type(call.message)(**expected)
    assert call.metadata["authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--json-schema", "{}"], {"json_schema": "{}"}),
        (["--json-schema", "@FILE"], {"json_schema": "from a file"}),
        (["--grammar", "@FILE"], {"grammar": "from a file"}),
        (["--choice", "a", "--choice", "@b"], {"choice": {"choices": ["a", "@b"]}}),
        (["--json-object"], {"json_object": True}),
    ],
)
def test_formats_and_files(server: FakeServer, tmp_path: Path, flags: list[str], wanted: dict[str, Any]) -> None:
    (tmp_path / "format").write_text("from a file")
    given = [flag.replace("@FILE", f"@{tmp_path / 'format'}") for flag in flags]
    assert run("complete", "Hi", *given, address=server.address).exit_code == 0
    message = server.calls[0].message
    assert message.format == type(message.format)(**wanted)


@pytest.mark.parametrize("flags", ["--logit-bias 5", "--logit-bias x=1", "--logit-bias 5=", "--regex @/no/such/file"])
def test_options_that_cannot_be_read(server: FakeServer, flags: str) -> None:
    done = run("complete", "Hi", *flags.split(), address=server.address)
    assert done.exit_code == 2
    assert flags.split()[1] in done.stderr
    assert not server.calls


def test_several_answers_come_one_after_another() -> None:
    with FakeServer(lambda request, index: f"answer {index}" + "\n" * (index == 1)) as server:
        shown = "--- 1 of 3 ---\nanswer 0\n--- 2 of 3 ---\nanswer 1\n--- 3 of 3 ---\nanswer 2\n"
        for flags in ([], ["--no-stream"]):
            done = run("complete", "Hi", "--n", "3", "--stats", *flags, address=server.address)
            assert done.stdout == shown
            assert "2 prompt tokens, 25 made, eos, eos, eos" in done.stderr
        echoed = run("complete", "Hi ", "--echo", address=server.address).stdout
        assert echoed == "Hi answer 0\n"


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}])
def test_explain_draws_how_each_token_was_picked(server: FakeServer, env: dict[str, str]) -> None:
    flags = ("--explain", "--candidates", "2", "--attention", "3", "--max-tokens", "2")
    plain = {"UNDERSTUDY_ADDRESS": server.address, "COLUMNS": "200", "FORCE_COLOR": None, "NO_COLOR": None}
    done = CliRunner().invoke(main.app, ["complete", "Hi", *flags], env=plain | env)
    assert done.exit_code == 0
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert "\x1b[3" not in done.stdout or "NO_COLOR" not in env
    assert drawn != done.stdout or not env.get("FORCE_COLOR")
    lines = [line.rstrip() for line in drawn.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[:6] == [
        "token 1  'H'",
        "  candidate              by the model             as drawn",
        "> 'H'                    ████████          50.0 % ████████████████ 100.0 %",
        "  'I'                    ████              25.0 %                        -",
        "  experts layer 1: 2 75.0 %, 5 25.0 %",
        "  layer 3 looked at 'i' 75.0 %  'H' 25.0 %",
    ]
    assert lines[-2:] == ["the answer", "He"]
    assert "layer 3 looked at 'H' 75.0 %  'H' 25.0 %" in lines[12]


def test_explain_for_programs_is_json(server: FakeServer) -> None:
    done = run("complete", "Hi", "--explain", "--json", "--max-tokens", "1", address=server.address)
    trace = json.loads(done.stdout.splitlines()[1])["delta"]["trace"]
    assert [c["text"] for c in trace["tokens"][0]["candidates"]] == ["H", "I", "J", "K", "L"]


def test_bars_and_percentages() -> None:
    assert [explain.bar(s, 2) for s in (0, 0.5, 1, 2, -1, 1 / 16, 0.75)] == ["", "█", "██", "██", "", "▏", "█▌"]
    assert explain.bar(0.5, 4, plain=True) == "##"
    assert [explain.percent(s) for s in (0, 1e-9, 0.5, 1)] == ["-", "<0.1 %", "50.0 %", "100.0 %"]
    assert [explain.shown(t, 7) for t in (" a\n", "\ufffd", "")] == ["' a\\n'", "#7", "#7"]


def test_what_is_not_asked_for_is_left_to_the_service(server: FakeServer) -> None:
    run("complete", "Hi", address=server.address)
    message = server.calls[0].message
    assert [field.name for field, _ in message.ListFields()] == ["request_id", "text", "response"]


def test_complete_json_prints_one_object_per_message(server: FakeServer) -> None:
    done = run("complete", "Hi", "--json", "--stop", "lo", "--logprobs", "0", address=server.address)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["prompt_info", "delta", "delta", "delta", "finish"]
    assert lines[0]["prompt_info"]["prompt_token_ids"] == [72, 105]
    assert lines[1]["delta"]["token_ids"] == [72]
    assert lines[1]["delta"]["logprobs"][0] == {"token_id": 72, "text": "H", "logprob": -0.5, "rank": 1, "top": []}
    assert lines[-1]["finish"] == {
        "index": 0,
        "reason": "FINISH_REASON_STOP_SEQUENCE",
        "matched": "lo",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "reasoning_tokens": 0},
    }


def test_an_empty_answer_has_a_prompt_and_a_finish_too() -> None:
    with FakeServer("") as server:
        done = run("complete", "Hi", "--json", address=server.address)
    assert [next(iter(json.loads(line))) for line in done.stdout.splitlines()] == ["prompt_info", "finish"]


def test_stats_go_to_stderr(server: FakeServer) -> None:
    done = run("complete", "Hi", "--stats", address=server.address)
    assert done.stdout == f"{TEXT}\n"
    assert "ttft" in done.stderr
    assert "2 prompt tokens, 12 made, eos" in done.stderr


def test_the_prompt_may_come_from_stdin(server: FakeServer) -> None:
    run("complete", "-", address=server.address, input="from a pipe\n")
    assert server.calls[0].message.text == "from a pipe\n"


def test_a_broken_stream_is_not_seen(server: FakeServer) -> None:
    for at in (3, 1, 5):
        server.break_after(at)
    assert run("complete", "Hi", address=server.address).stdout == f"{TEXT}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            errors.InvalidRequest("is 2; it must be in (0, 1]", "sampling.top_p"),
            "sampling.top_p: is 2; it must be in (0, 1]",
        ),
        (errors.Unauthenticated("unknown token"), "unknown token; give --token or UNDERSTUDY_TOKEN"),
        (errors.Overloaded("full", 2.5), "full; try again in 2.5 s"),
        (errors.InternalError("two\nlines"), "two lines"),
    ],
    ids=lambda e: getattr(e, "kind", ""),
)
def test_an_error_is_one_line(server: FakeServer, error: errors.UnderstudyError, line: str) -> None:
    server.break_after(0, error)
    done = run("complete", "Hi", address=server.address)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"error: {line}\n")


def test_an_error_amid_the_answer_begins_a_line(server: FakeServer) -> None:
    server.break_after(3, errors.InternalError("a fault"))
    done = run("complete", "Hi", address=server.address)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "He\n", "error: a fault\n")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("complete Hi", "--address"),
        ("models", "--address"),
        ("status", "--admin"),
        ("experts", "--admin"),
        ("bench", "--address"),
    ],
)
def test_no_service_says_how_to_start_one(server: FakeServer, command: str, flag: str) -> None:
    server.stop()
    done = run(*command.split(), address=server.address)
    way_out = "start one with `make serve` or `understudy serve`, or give"
    assert done.exit_code == 1
    assert done.stderr == f"error: no service at {server.address}; {way_out} {flag}\n"


@pytest.mark.parametrize("args", [["complete"], ["complete", "Hi", "--top-k", "x"], ["nonsense"], ["models", "--nope"]])
def test_a_wrong_command_line_exits_with_2(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["complete", "models", "status", "experts", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert command in done.stdout
    assert "--json" in done.stdout


def test_models(server: FakeServer) -> None:
    table = run("models", address=server.address)
    assert table.exit_code == 0
    for word in ("fake", "FakeForCausalLM", "float32", "4,096", "1,114,112"):
        assert word in table.stdout
    [model] = json.loads(run("models", "--json", address=server.address).stdout)["models"]
    assert (model["name"], model["max_context"], model["eos_token_ids"]) == ("fake", 4096, [])


@pytest.fixture
def busy(server: FakeServer) -> FakeServer:
    status = server.status
    status.uptime_s = 12.5
    status.models.add(name="m", model_fingerprint="f" * 64, numerics_id="n", replicas_ready=1, replicas_wanted=2)
    replica = status.replicas.add(
        id="m-0", model="m", state=admin_pb2.REPLICA_STATE_LOST, node="10.0.0.1", cause="silent"
    )
    replica.epoch = 2**40
    replica.cache.hit_tokens, replica.cache.queried_tokens = 1, 4
    replica.cache.store_hit_tokens = 2
    status.replicas[0].cache.store_loaded_bytes, status.replicas[0].cache.store_load_seconds = 4_000_000, 0.5
    status.router.decisions["least_work"] = 31
    status.router.decisions["device"] = 0
    status.router.reused_tokens["device"] = 12_345
    status.router.index.stored_blocks = 77
    status.processes.add(role="shard", pid=4242, node="10.0.0.1", replica="m-0", rank=0)
    status.processes.add(role="[router]", pid=4243, node="10.0.0.1")
    return server


@pytest.fixture
def with_experts(busy: FakeServer) -> FakeServer:
    """A mixture whose experts are on two hosts."""
    placement = busy.status.experts.add(
        model="m", replica="m-0", version=3, target_version=4, balance=0.91, age_s=42, experts=128, copies=130,
        hosts_wanted=2, problem="no room",
    )  # fmt: skip
    for name, state in (("h0", "ready"), ("h1", "loading")):
        placement.hosts.add(name=name, life=1, state=state, node="10.0.0.1", pid=77, held=65, capacity=90, rows=12345)
    return busy


def test_experts_are_shown_and_their_hosts_added_and_removed(with_experts: FakeServer) -> None:
    shown = run("experts", "--admin", with_experts.address).stdout
    for word in ("m-0: placement 3, 4 is being loaded", "balance 0.91", "2 of 2 hosts", "no room", "loading", "12,345"):
        assert word in shown
    assert "2 of 5 hosts" in run("experts", "--add", "3", "--admin", with_experts.address).stdout
    assert "2 of 4 hosts" in run("experts", "--remove", "1", "--model", "m", "--admin", with_experts.address).stdout
    found = json.loads(run("experts", "--json", "--admin", with_experts.address).stdout)["experts"]
    assert [p["hosts_wanted"] for p in found] == [4]
    assert "placement 3" in run("status", "--admin", with_experts.address).stdout


def test_experts_that_are_not_there_are_refused_in_one_line(busy: FakeServer, with_experts: FakeServer) -> None:
    assert "--model x" in run("experts", "--model", "x", "--admin", busy.address).stderr
    assert "one has to stay" in run("experts", "--remove", "2", "--admin", busy.address).stderr
    del busy.status.experts[:]
    assert "--expert-hosts N" in run("experts", "--admin", busy.address).stderr


def test_status_json_is_for_scripts(busy: FakeServer) -> None:
    status = json.loads(run("status", "--json", address=busy.address).stdout)
    assert set(status) == {"version", "models", "replicas", "processes", "uptime_s", "experts", "router"}
    assert status["router"]["decisions"] == {"device": 0, "least_work": 31}
    assert status["router"]["index"]["stored_blocks"] == 77
    replica = status["replicas"][0]
    assert (replica["id"], replica["state"], replica["node"]) == ("m-0", "REPLICA_STATE_LOST", "10.0.0.1")
    assert replica["epoch"] == 2**40
    assert replica["cache"]["hit_tokens"] == 1
    shard = {"role": "shard", "pid": 4242, "node": "10.0.0.1", "replica": "m-0", "rank": 0}
    assert status["processes"][0] == shard


def test_status_is_a_table_for_people(busy: FakeServer) -> None:
    shown = run("status", "--admin", busy.address).stdout
    words = (
        "lost: silent",
        "25% + 0% + 50%",
        "4242",
        "[router]",
        "up for 12 s",
        "m-0",
        "least work 31",
        "device 12,345",
        "4.0 MB in 0.50 s",
    )
    for word in words:
        assert word in shown


def test_a_state_of_a_later_version_stays_a_number() -> None:
    message = admin_pb2.Replica.FromString(b"\x18\x63")
    assert message_dict(message)["state"] == 99


def test_bench_counts_what_it_received(server: FakeServer) -> None:
    args = ("bench", "--streams", "3", "--requests", "7", "--prompt-tokens", "5", "--tokens", "8", "--json")
    done = run(*args, address=server.address)
    figures = json.loads(done.stdout)
    assert (figures["requests"], figures["tokens"], figures["prompt_tokens"]) == (7, 7 * 8, 5)
    assert 0 < figures["ttft_ms_p50"] <= figures["ttft_ms_p95"]
    assert len(server.calls) == 8  # one warms up
    prompts = {tuple(call.message.token_ids.ids) for call in server.calls}
    assert len(prompts) == 8
    assert {len(prompt) for prompt in prompts} == {5}
    assert all(call.message.stopping.ignore_eos for call in server.calls)
    assert "tokens/s" in run(*args[:-1], address=server.address).stdout


def test_bench_says_what_cannot_be(server: FakeServer) -> None:
    over = run("bench", "--prompt-tokens", "4000", "--tokens", "97", address=server.address)
    assert (over.exit_code, "4096" in over.stderr) == (1, True)
    assert "there are fake" in run("bench", "--model", "x", address=server.address).stderr
    server.break_after(0)
    server.break_after(0, errors.Overloaded("full", 1.0))
    assert run("bench", "--streams", "2", address=server.address).stderr == "error: full; try again in 1 s\n"


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(v) for v in range(100, 0, -1)]
    assert [percentile(values, q) for q in (0, 0.5, 0.95, 1)] == [1, 50, 95, 100]
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([], 0.5) == 0.0


def point(value: str) -> dict[str, EntryPoint]:
    return {"serve": EntryPoint("serve", value, main.GROUP)}


def test_a_command_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_added", lambda: point("no_such_room.commands:serve"))
    done = run("serve", "--model", "x", "-v")
    assert done.exit_code == 1
    assert "pip install '.[serve]'" in done.stderr
    assert "no_such_room" in done.stderr
    listed = run("--help").stdout
    assert "serve" in listed
    assert "Not installed here" in listed


def served(answer: int = 41, *, loud: bool = False) -> None:
    """Serve something."""
    print(answer + 1, loud)
    if loud:
        raise errors.ConfigError("--port: 0 is no port")


def test_a_command_of_another_room_is_part_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_added", lambda: point(f"{__name__}:served"))
    assert run("serve", "--answer", "1").stdout == "2 False\n"
    assert "Serve something." in run("--help").stdout
    failed = run("serve", "--loud")
    assert (failed.exit_code, failed.stderr) == (1, "error: --port: 0 is no port\n")


def starved() -> None:
    """Needs more than a client has."""
    import no_such_package  # noqa: F401


def test_a_command_that_misses_its_packages_when_it_runs_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_added", lambda: point(f"{__name__}:starved"))
    done = run("serve")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: `understudy serve` needs the package 'no_such_package'")
    assert "pip install '.[serve]'" in done.stderr


def test_a_fault_inside_another_room_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "_added", lambda: point(f"{__name__}:no_such_function"))
    assert isinstance(run("serve").exception, AttributeError)


def test_as_a_program(server: FakeServer) -> None:
    process = program("complete", "Hi", "--address", server.address)
    assert process.communicate(timeout=60) == (f"{TEXT}\n", "")
    assert process.returncode == 0


def test_ctrl_c_cancels_the_call(server: FakeServer) -> None:
    server.hold_after(3)
    process = program("complete", "Hi", "--address", server.address, "--json")
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert server.cancelled.wait(10)
    assert out == ""


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    with FakeServer("x" * 200_000, piece=50_000) as server:
        process = program("complete", "Hi", "--address", server.address)
        assert process.stdout is not None
        assert process.stdout.read(1) == "x"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(60) == 141
