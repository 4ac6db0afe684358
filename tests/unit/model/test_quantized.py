"""Weights in fewer bits: what is missing or does not fit is refused by name; what is there is read to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import CONFIG
from torch import Tensor

from understudy.errors import CheckpointError
from workers.model.config import parse_config
from workers.model.quantized import open_weights
from workers.model.spec import Quantization
from workers.model.weights import Checkpoint, Part

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def source(directory: Path, method: str, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    quantization = Quantization("mxfp4", (1, 32)) if method == "mxfp4" else Quantization("fp8", (128, 128))
    return open_weights(directory, quantization, dtype)


def mxfp4(experts: int = 2, n: int = 6, k: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (experts, n, k // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (experts, n, k // 32), generator=generator, dtype=torch.uint8)
    return {"w_blocks": blocks, "w_scales": scales}


def fp8(rows: int = 150, columns: int = 300) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
    return {"w.weight": weight, "w.weight_scale_inv": scales}


# What is refused ----------------------------------------------------------------------------------------------------


def test_missing_scales(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor w_scales is missing, which holds the scales of the quantized w"):
        source(tmp_path, "mxfp4", {"w_blocks": mxfp4()["w_blocks"]}).get("w", (2, 64, 6))
    with pytest.raises(CheckpointError, match=r"tensor w\.weight_scale_inv is missing"):
        source(tmp_path, "fp8", {"w.weight": fp8()["w.weight"]}).get("w.weight", (150, 300))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"w_blocks has shape \[2, 6, 2, 16\], config.json implies \[2, 6, 3, 16\]"
    ):
        source(tmp_path, "mxfp4", mxfp4()).get("w", (2, 96, 6))
    with pytest.raises(CheckpointError, match=r"rows of 65 values, not a multiple of the 32"):
        source(tmp_path, "mxfp4", mxfp4()).get("w", (2, 65, 6))
    short = mxfp4() | {"w_scales": mxfp4()["w_scales"][:, :5].contiguous()}
    with pytest.raises(CheckpointError, match=r"w_scales has shape \[2, 5, 2\], config.json implies \[2, 6, 2\]"):
        source(tmp_path, "mxfp4", short).get("w", (2, 64, 6))
    with pytest.raises(CheckpointError, match=r"w\.weight has shape \[150, 300\], config.json implies \[150, 301\]"):
        source(tmp_path, "fp8", fp8()).get("w.weight", (150, 301))
    small = fp8() | {"w.weight_scale_inv": torch.ones(1, 3)}
    with pytest.raises(CheckpointError, match=r"weight_scale_inv has shape \[1, 3\], config.json implies \[2, 3\]"):
        source(tmp_path, "fp8", small).get("w.weight", (150, 300))


def test_dtypes_that_do_not_fit(tmp_path: Path) -> None:
    floats = mxfp4() | {"w_blocks": mxfp4()["w_blocks"].float()}
    with pytest.raises(CheckpointError, match="w_blocks has dtype F32; known are U8"):
        source(tmp_path, "mxfp4", floats).get("w", (2, 64, 6))
    bytes_ = fp8() | {"w.weight_scale_inv": torch.ones(2, 3, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="weight_scale_inv has dtype U8"):
        source(tmp_path, "fp8", bytes_).get("w.weight", (150, 300))


def test_scales_that_are_no_number(tmp_path: Path) -> None:
    tensors = mxfp4()
    tensors["w_scales"][1, 3, 1] = 255
    with pytest.raises(CheckpointError, match="w_scales has scales that are not a number"):
        source(tmp_path, "mxfp4", tensors).get("w", (2, 64, 6))


def test_scaled_weights_without_a_method_are_refused(tmp_path: Path) -> None:
    """Read as they lie on disk they would be wrong numbers."""
    save_file(fp8(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dtype F8_E4M3; .*only where quantization_config"):
        Checkpoint(tmp_path).get("w.weight", (150, 300))


# What is read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_value_by_value(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mxfp4()
    got = source(tmp_path, "mxfp4", tensors, dtype).get("w", (2, 64, 6))
    want = torch.empty(2, 64, 6)
    for e in range(2):
        for n in range(6):
            for k in range(64):
                byte = int(tensors["w_blocks"][e, n, k // 32, k % 32 // 2])
                scale = int(tensors["w_scales"][e, n, k // 32])
                want[e, k, n] = E2M1[byte & 15 if k % 2 == 0 else byte >> 4] * 2.0 ** (scale - 127)
    assert torch.equal(got, want.to(dtype))


def test_mxfp4_is_exact_at_the_ends_of_its_exponents(tmp_path: Path) -> None:
    tensors = mxfp4(1, 1, 32)
    for exponent in (0, 1, 252):
        tensors["w_scales"].fill_(exponent)
        for dtype in (torch.float32, torch.bfloat16):
            got = source(tmp_path, "mxfp4", tensors, dtype).get("w", (1, 32, 1)).double()
            want = source(tmp_path, "mxfp4", tensors | {"w_scales": torch.full((1, 1, 1), 127, dtype=torch.uint8)})
            assert torch.equal(got, want.get("w", (1, 32, 1)).double() * 2.0 ** (exponent - 127))


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_value_by_value(tmp_path: Path, dtype: torch.dtype, scales: torch.dtype) -> None:
    tensors = fp8()
    tensors["w.weight_scale_inv"] = tensors["w.weight_scale_inv"].to(scales)
    got = source(tmp_path, "fp8", tensors, dtype).get("w.weight", (150, 300))
    weight, scale = tensors["w.weight"].float(), tensors["w.weight_scale_inv"].float()
    want = weight * scale.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("part", [Part(0, 1, 2), Part(1, 3, 40), Part(2, 2, 5)])
def test_parts_are_parts_of_the_whole(tmp_path: Path, part: Part) -> None:
    packed = source(tmp_path, "mxfp4", mxfp4())
    whole = packed.get("w", (2, 64, 6))
    assert torch.equal(packed.get("w", (2, 64, 6), part), whole.narrow(part.dim, part.start, part.stop - part.start))
    stacked = {name: torch.stack([t.float(), t.float() * 2]) for name, t in fp8().items()}
    stacked["w.weight"] = stacked["w.weight"].to(torch.float8_e4m3fn)
    packed = source(tmp_path, "fp8", stacked)
    whole = packed.get("w.weight", (2, 150, 300))
    if part.dim:  # across a border of blocks
        part = Part(part.dim, 90, 140)
    got = packed.get("w.weight", (2, 150, 300), part)
    assert torch.equal(got, whole.narrow(part.dim, part.start, part.stop - part.start))


def test_bytes_are_those_of_the_values(tmp_path: Path) -> None:
    """What is left of the memory, and how far loading is, are counted by them."""
    packed = source(tmp_path, "mxfp4", mxfp4() | {"plain": torch.zeros(3)}, torch.bfloat16)
    assert sum(map(packed.nbytes, packed.entries)) == 2 * 6 * 64 * 2 + 3 * 4
    assert {"w", "plain", "v"} - {n for n in ("w", "plain", "v") if n in packed} == {"v"}
    packed = source(tmp_path, "fp8", fp8() | {"plain": torch.zeros(3)}, torch.bfloat16)
    assert sum(map(packed.nbytes, packed.entries)) == 150 * 300 * 2 + 3 * 4


def test_the_fingerprint_sees_scales_and_weights(tmp_path: Path) -> None:
    spec = parse_config(CONFIG)
    prints = set()
    for method, tensors in (("fp8", fp8()), ("mxfp4", mxfp4())):
        for name in tensors:
            prints.add(source(tmp_path, method, tensors).fingerprint(spec))
            raw = tensors[name].flatten().view(torch.uint8)
            raw[-1] ^= 1
            prints.add(source(tmp_path, method, tensors).fingerprint(spec))
    assert len(prints) == 6  # of each method: as it was, one scale changed, one weight changed
