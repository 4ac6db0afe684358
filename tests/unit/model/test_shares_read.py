"""A rank reads its own part of a checkpoint and nothing else: bytes counted, and memory held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import tensors, write
from torch import Tensor

from workers.engine.contract import EngineConfig
from workers.engine.runner import Runner
from workers.kernels.plain import PlainOps
from workers.model.config import read_spec
from workers.model.decoder import load_decoder
from workers.model.load import Loader
from workers.model.weights import Checkpoint, Part
from workers.parallel.group import Alone
from workers.parallel.share import Share


class OneOf(Alone):
    """A rank whose mates are not there: enough to load with."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class Counting(Checkpoint):
    """Notes which elements of each tensor are asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        seen = self.seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        (seen if part is None else seen.narrow(part.dim, part.start, part.stop - part.start)).fill_(True)
        return super().get(name, shape, part)


@pytest.mark.parametrize(("size", "invariant"), [(2, False), (4, False), (4, True), (1, True)])
def test_ranks_read_disjoint_parts_that_make_the_whole(tmp_path: Path, size: int, invariant: bool) -> None:
    path, read = write(tmp_path), []
    spec, ops, cpu = read_spec(path), PlainOps(torch.float32), torch.device("cpu")
    for rank in range(size):
        checkpoint, count = Counting(path), []
        share = Share(rank, size, invariant)
        load = Loader(checkpoint, ops, cpu, count.append, share, OneOf(rank, size))
        load_decoder(spec, load, ops, 64, cpu)
        read.append(checkpoint.seen)
        held = sum(int(seen.sum()) for seen in checkpoint.seen.values()) * 4
        assert sum(count) == held, "progress counts what is read"
    for name, whole in tensors().items():
        readers = sum(part[name].int() for part in read)
        if "norm" in name:
            assert int(readers.min()) == size
        elif size == 4 and ("k_proj" in name or "v_proj" in name):
            assert set(readers.flatten().tolist()) == {2}, "two KV heads over four ranks: each is held twice"
        else:
            assert set(readers.flatten().tolist()) == {1}, name
        assert readers.shape == whole.shape


def test_the_cache_is_divided_like_the_heads(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = Runner.from_checkpoint(EngineConfig(str(path), kernels="plain", cache_bytes=1 << 20))
    config = EngineConfig(str(path), kernels="plain", cache_bytes=1 << 20, tensor_parallel=2)
    rank = Runner.from_checkpoint(config, group=OneOf(1, 2))
    assert rank.block_bytes * 2 == whole.block_bytes
    assert rank.blocks == whole.blocks, "cache_bytes are those of all ranks together"
    assert rank.info.cache_bytes == whole.info.cache_bytes
    assert rank.info.numerics_id == whole.info.numerics_id + "/tensor-parallel-2"
    assert rank.info.model_fingerprint == whole.info.model_fingerprint
