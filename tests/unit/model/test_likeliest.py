"""An engine whose head has a sieve answers as one without: the same tokens, whatever else is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tensors, write
from torch import Tensor

from workers.engine import EngineConfig, Request, Sampling
from workers.engine.build import build_engine
from workers.kernels import native
from workers.kernels.build import BuildError
from workers.kernels.native_linear import NativeSieve

V = 4096


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = tensors()
    generator = torch.Generator().manual_seed(9)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.randn(V, 16, generator=generator)
    return write(tmp_path, {name: w.bfloat16() for name, w in weights.items()}, vocab_size=V, torch_dtype="bfloat16")


def answers(path: Path, requests: list[Request]) -> dict[str, list[tuple[int, float | None]]]:
    """Token and logprob of each, all at once and then each alone."""
    engine = build_engine(EngineConfig(str(path), cache_bytes=1 << 19, max_running=4))
    made: dict[str, list[tuple[int, float | None]]] = {}
    for turn, group in enumerate([requests, *([each] for each in requests)]):
        for r in group:
            engine.add(Request(f"{r.id}/{turn}", r.prompt, r.max_tokens, r.sampling, logprobs=r.logprobs))
        while engine.has_work():
            for out in engine.step():
                assert not out.error
                told = [t.logprob for t in out.logprobs] if out.logprobs else [None] * len(out.token_ids)
                made.setdefault(out.id, []).extend(zip(out.token_ids, told, strict=True))
    engine.check_idle()
    engine.close()
    return made


def test_a_sieve_changes_no_answer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        ops = native.NativeOps(torch.bfloat16)
    except BuildError as reason:
        pytest.skip(str(reason))
    requests = [
        Request("greedy", [1, 2, 3], 24, Sampling(temperature=0)),
        Request("told", [1, 2, 3], 8, Sampling(temperature=0), logprobs=2),
        Request("drawn", [4, 5], 8, Sampling(temperature=0.7, seed=3)),
    ]
    plain = answers(checkpoint, requests)
    sifted: list[tuple[Tensor, Tensor] | None] = []
    call = NativeSieve.__call__

    def spy(self: NativeSieve, x: Tensor) -> tuple[Tensor, Tensor] | None:
        sifted.append(call(self, x))
        return sifted[-1]

    monkeypatch.setattr(native, "_SIFTED", 0)
    monkeypatch.setattr(NativeSieve, "__call__", spy)
    assert answers(checkpoint, requests) == plain
    weight = torch.zeros(64, 16, dtype=torch.bfloat16)
    if ops.sieve(ops.linear(weight), weight) is not None:  # kernels that have one used it, for the greedy one alone
        assert len(sifted) >= 24
        assert any(found is not None for found in sifted)
