"""A rank reads its own part of a checkpoint and nothing else: bytes counted, and memory held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
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


GROWTH = """
import sys, torch
from safetensors import safe_open  # imported before anything is counted
from workers.engine.contract import EngineConfig
from workers.engine.runner import Runner
sys.path.insert(0, sys.argv[3])
from test_shares_read import OneOf


def memory(name):  # in KiB, of this program alone: getrusage counts what forked it, too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


def load(path, size):
    config = EngineConfig(path, kernels="plain", cache_bytes=1 << 20, threads=1, tensor_parallel=size)
    return Runner.from_checkpoint(config, **({"group": OneOf(0, size)} if size > 1 else {}))


load(sys.argv[4], 1).close()  # so that what a first load brings into the process is there
open("/proc/self/clear_refs", "w").write("5")  # the highest is counted from now on
before = memory("VmHWM"), memory("RssAnon")
runner = load(sys.argv[1], int(sys.argv[2]))
print(memory("VmHWM") - before[0], memory("RssAnon") - before[1])
"""


def growth(path: Path, size: int, small: Path) -> tuple[int, int]:
    """KiB by which the memory of a process grows while it loads rank 0 of `size`: at its highest, pages of the mapped
    file included, and what it then holds by itself."""
    here = Path(__file__)
    command = [sys.executable, "-c", GROWTH, str(path), str(size), str(here.parent), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here.parents[3])
    highest, own = map(int, done.stdout.split())
    return highest, own


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc: Linux alone")
def test_a_ranks_memory_is_its_part_of_the_model_at_its_highest_too(tmp_path: Path) -> None:
    """A model of 151 MiB. Slices of columns touch all pages of their tensors: those are the kernel's, to take back."""
    large, small = tmp_path / "large", tmp_path / "small"
    for path in (large, small):
        path.mkdir()
    write_llama(large)
    write_llama(small, hidden=64, layers=1)
    whole, half, quarter = (growth(large, size, small) for size in (1, 2, 4))
    assert (half[0] < 0.8 * whole[0], quarter[0] < 0.65 * whole[0]) == (True, True), (whole, half, quarter)
    assert (half[1] < 0.6 * whole[1], quarter[1] < 0.4 * whole[1]) == (True, True), (whole, half, quarter)


def write_llama(path: Path, hidden: int = 512, layers: int = 8) -> Path:
    """A random Llama, large enough that its weights are most of what a process holds."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8000, "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 8, "rms_norm_eps": 1e-5,
        "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    made = {
        "model.embed_tokens.weight": (8000, hidden),
        "lm_head.weight": (8000, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        made |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        made |= {f"{at}.self_attn.{name}.weight": (hidden, hidden) for name in ("q_proj", "o_proj")}
        made |= {f"{at}.self_attn.{name}.weight": (hidden // 2, hidden) for name in ("k_proj", "v_proj")}
        made |= {f"{at}.mlp.{name}.weight": (4 * hidden, hidden) for name in ("gate_proj", "up_proj")}
        made[f"{at}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
    draw = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(*shape, generator=draw) for name, shape in made.items()}, path / "model.safetensors")
    return path
