"""However a file is damaged: a CheckpointError, or tensors of the right shapes; never anything else."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import CONFIG, tensors, write

from understudy.errors import CheckpointError
from workers.model.config import parse_config
from workers.model.spec import ModelSpec
from workers.model.weights import Checkpoint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tensors are to be damaged; `whole` stays as it was."""
    path = write(tmp_path_factory.mktemp("checkpoint"))
    (path / "whole").write_bytes((path / "model.safetensors").read_bytes())
    return path


def read_all(path: Path) -> None:
    opened = Checkpoint(path)
    for name, tensor in tensors().items():
        assert opened.get(name, tuple(tensor.shape)).shape == tensor.shape


@settings(derandomize=True, deadline=None)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_cut_anywhere(checkpoint: Path, kept: float) -> None:
    data = (checkpoint / "whole").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (is truncated|has \d bytes)"):
        read_all(checkpoint)


@settings(derandomize=True, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_byte_of_the_header_changed(checkpoint: Path, place: float, value: int) -> None:
    data = (checkpoint / "whole").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    at = int((8 + length) * place)
    (checkpoint / "model.safetensors").write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
    with contextlib.suppress(CheckpointError):
        read_all(checkpoint)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(key=st.sampled_from(["dtype", "shape", "data_offsets", None]), value=JSON)
def test_a_value_of_the_header_replaced(checkpoint: Path, key: str | None, value: Any) -> None:
    data = (checkpoint / "whole").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    if key is None:
        header["lm_head.weight"] = value
    else:
        header["lm_head.weight"][key] = value
    text = json.dumps(header).encode()
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"lm_head|header"):
        read_all(checkpoint)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(key=st.sampled_from([*CONFIG, "rope_scaling", "rope_parameters", "head_dim", "sliding_window"]), value=JSON)
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_a_value_of_the_configuration_replaced(architecture: str, key: str, value: Any) -> None:
    with contextlib.suppress(CheckpointError):
        spec = parse_config(CONFIG | {"architectures": [architecture]} | {key: value})
        assert isinstance(spec, ModelSpec)
        assert len(spec.ffn) == spec.layers == sum(len(group.layers) for group in spec.groups)
