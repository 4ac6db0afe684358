"""A runner refuses rows that would touch memory that is not theirs, and gives back what it holds."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import tensors, write

from understudy.errors import ConfigError
from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.engine.sizes import cache_size, left_in_group
from workers.kernels.plain import PlainOps
from workers.model.config import read_spec
from workers.model.weights import Checkpoint, Part


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner.from_checkpoint(EngineConfig(model_dir=str(write(tmp_path)), kernels="plain", cache_bytes=8 * 2048))


def chunk(**changes: Any) -> Chunk:
    return Chunk(**({"id": "a", "start": 0, "tokens": [1, 2], "tables": (array("i", [3]),), "wanted": 1} | changes))


def test_only_sampled_chunks_have_logits_in_order(runner: Runner) -> None:
    mates = [chunk(id=str(i), tables=(array("i", [i]),), tokens=[i + 1], wanted=int(i != 1)) for i in range(3)]
    logits = runner.run(StepPlan(0, mates))
    assert logits.shape == (2, 32)
    assert logits.dtype == torch.float32
    for row, mate in zip(logits, (mates[0], mates[2]), strict=True):
        assert torch.equal(row, runner.run(StepPlan(1, [mate]))[0])


def test_several_rows_of_a_chunk_are_those_of_its_beginnings(runner: Runner) -> None:
    mates = [chunk(id="a", tokens=[3, 4, 5, 6], wanted=3), chunk(id="b", tables=(array("i", [1]),), tokens=[7, 8])]
    logits = runner.run(StepPlan(0, mates))
    assert logits.shape == (4, 32)
    for i in range(3):
        alone = runner.run(StepPlan(1, [chunk(tokens=[3, 4, 5, 6][: i + 2], tables=(array("i", [2]),))]))
        assert torch.equal(logits[i], alone[0])
    assert torch.equal(logits[3], runner.run(StepPlan(2, [mates[1]]))[0])


@pytest.mark.parametrize("wanted", [-1, 3])
def test_rows_wanted_are_rows_of_the_chunk(runner: Runner, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"wanted rows \\[1, {wanted}\\] of chunks of \\[2, 2\\] rows"):
        runner.run(StepPlan(0, [chunk(), chunk(tables=(array("i", [4]),), wanted=wanted)]))


def test_nothing_sampled_and_nothing_at_all(runner: Runner) -> None:
    assert runner.run(StepPlan(0, [chunk(wanted=0)])).shape == (0, 32)
    assert runner.run(StepPlan(1)).shape == (0, 32)


def test_rows_not_sampled_still_reach_the_cache(runner: Runner) -> None:
    whole = runner.run(StepPlan(0, [chunk(tokens=[5, 6, 7])]))
    runner.run(StepPlan(1, [chunk(tokens=[5, 6], wanted=0, tables=(array("i", [1]),))]))
    assert torch.equal(runner.run(StepPlan(2, [chunk(start=2, tokens=[7], tables=(array("i", [1]),))])), whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": []}, r"\[0, 0\) are none, or outside the context of 64"),
        ({"start": 10**12}, "outside the context of 64"),
        ({"start": 63}, r"positions \[63, 65\)"),
        ({"start": -1}, r"positions \[-1, 1\)"),
        ({"tokens": [1, 32]}, "vocabulary of 32"),
        ({"tokens": [-1]}, "vocabulary of 32"),
        ({"tables": (array("i", [8]),)}, "entry 0 of its table in cache group 0 is 8, of 8 blocks"),
        ({"tables": (array("i", [-1]),)}, "is -1, of 8 blocks"),
        ({"tables": (array("i"),)}, "is -1, of 8 blocks"),
        ({"start": 15, "tables": (array("i", [2]),)}, "entry 1 of its table"),
    ],
)
def test_rows_outside_are_refused(runner: Runner, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        runner.run(StepPlan(0, [chunk(id="mate", tables=(array("i", [0]),)), chunk(**changes)]))


def test_tables_can_grow_after_a_step(runner: Runner) -> None:
    """A buffer exported by `array` would make its next append fail."""
    table = array("i", [0])
    runner.run(StepPlan(0, [chunk(tables=(table,))]))
    table.append(1)


def test_a_closed_runner_says_so(runner: Runner) -> None:
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(StepPlan(0, [chunk()]))
    assert not runner.caches


def test_info_and_cache(runner: Runner) -> None:
    info = runner.info
    assert (info.blocks, info.windows, info.max_context, info.vocab_size) == ((8,), (None,), 64, 32)
    assert info.cache_bytes == sum(cache.bytes for cache in runner.caches) == 8 * runner.block_bytes
    assert info.numerics_id == runner.ops.numerics_id


def test_a_part_of_a_tensor(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(checkpoint.get(name, (16, 24), Part(1, 6, 12)), tensors()[name][:, 6:12])
    assert torch.equal(checkpoint.get(name, (16, 24), Part(0, 4, 16)), tensors()[name][4:])


@pytest.mark.parametrize(("memory", "context", "blocks"), [(1 << 30, 64, 4 * 64), (4 * 2048 * 3, 48, 3)])
def test_the_default_cache(tmp_path: Path, memory: int, context: int, blocks: int) -> None:
    """64 full contexts of 4 blocks of 2 KiB, or a quarter of a memory too small for one."""
    config = EngineConfig(model_dir=str(write(tmp_path)), kernels="plain")
    assert cache_size(read_spec(tmp_path), PlainOps(torch.float32), config, memory) == (context, blocks)


def test_cached_pages_of_files_are_free_memory(tmp_path: Path) -> None:
    assert left_in_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 200\nfile 700\ninactive_file 600\nactive_file 50\nshmem 50\n")
    assert left_in_group(tmp_path) == 750
    (tmp_path / "memory.current").write_text("2000\n")
    assert left_in_group(tmp_path) == 0


def test_a_machine_without_memory_is_told_what_is_missing(tmp_path: Path) -> None:
    config = EngineConfig(model_dir=str(write(tmp_path)), kernels="plain", max_context=64)
    with pytest.raises(ConfigError, match="give at least 8192 bytes"):
        cache_size(read_spec(tmp_path), PlainOps(torch.float32), config, 4 * 2048 * 3)
