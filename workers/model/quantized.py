"""Checkpoints that keep their large weights in fewer bits, dequantized as they are asked for.

Each tensor, or the part of it that is wanted, becomes the dtype that the operations compute in when it is read; what
is in memory at one time is that part and, in float32, one matrix of it. Products are taken in float32 and rounded once.

mxfp4 (gpt-oss): `{name}_blocks` holds two e2m1 values per byte, the lower half first, 16 bytes for 32 values of a row
which share one exponent in `{name}_scales`: value * 2^(scale - 127). https://www.opencompute.org/documents/
ocp-microscaling-formats-mx-v1-0-spec-final-pdf. As the families' code knows such a tensor it is [E, K, N], while rows
of blocks run along K: blocks [E, N, K / 32, 16], scales [E, N, K / 32].

fp8 (DeepSeek-V3, https://arxiv.org/abs/2412.19437): float8_e4m3fn with one factor for each block of 128 x 128 in
`{name}_scale_inv`, the last blocks of an axis cut off where its size is no multiple.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from understudy.errors import CheckpointError
from workers.model.spec import Quantization
from workers.model.weights import VALUES, Checkpoint, Entry, Part

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # values that share a scale in mxfp4
_NO_EXPONENT = 255  # of e8m0: not a number


def open_weights(model_dir: Path, quantization: Quantization | None, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint of a directory; weights that are quantized come out of it in `dtype`."""
    if quantization is None:
        return Checkpoint(model_dir)
    return (_Mxfp4 if quantization.method == "mxfp4" else _Fp8)(model_dir, quantization, dtype)


class _Quantized(Checkpoint):
    """Tensors that are not quantized come as they are."""

    def __init__(self, model_dir: Path, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__(model_dir)
        self.block, self.dtype = quantization.block, dtype

    def _need(self, name: str, of: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(
                f"{self.model_dir}: tensor {name} is missing, which holds the scales of the quantized {of}"
            )
        return self.entries[name]


class _Mxfp4(_Quantized):
    """Experts of gpt-oss."""

    def __contains__(self, name: str) -> bool:
        return name in self.entries or f"{name}_blocks" in self.entries

    def nbytes(self, name: str) -> int:
        if name.endswith("_blocks"):
            return 2 * super().nbytes(name) * int(self.dtype.itemsize)
        return 0 if name.removesuffix("_scales") + "_blocks" in self.entries else super().nbytes(name)

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        blocks_name, scales_name = f"{name}_blocks", f"{name}_scales"
        if name in self.entries or blocks_name not in self.entries:
            return super().get(name, shape, part)
        self._need(scales_name, name)
        experts, k, n = shape
        if k % _GROUP:
            raise CheckpointError(
                f"{self.entries[blocks_name].file}: {name} has rows of {k} values, not a multiple of the {_GROUP} "
                "that share a scale in mxfp4"
            )
        # Parts along the experts or the output are parts on disk; along the input they are cut from the result.
        stored = None if part is None or part.dim == 1 else Part(part.dim // 2, part.start, part.stop)
        blocks = self.stored(blocks_name, (experts, n, k // _GROUP, _GROUP // 2), ("U8",), stored)
        scales = self.stored(scales_name, (experts, n, k // _GROUP), ("U8", "F8_E8M0"), stored).view(torch.uint8)
        if bool((scales == _NO_EXPONENT).any()):
            raise CheckpointError(f"{self.entries[scales_name].file}: {scales_name} has scales that are not a number")
        values = torch.empty((*scales.shape[:2], k), dtype=self.dtype)
        for expert, (b, s) in enumerate(zip(blocks, scales, strict=True)):
            values[expert] = mxfp4_values(b, s)
        whole = values.transpose(1, 2)
        return whole if part is None or stored is not None else whole.narrow(1, part.start, part.stop - part.start)


class _Fp8(_Quantized):
    """Any matrix that is kept in float8_e4m3fn."""

    def nbytes(self, name: str) -> int:
        if name.removesuffix("_scale_inv") != name:
            return 0
        scaled = name in self.entries and self.entries[name].dtype == "F8_E4M3"
        return super().nbytes(name) * (self.dtype.itemsize if scaled else 1)

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        if name not in self.entries or self.entries[name].dtype != "F8_E4M3":
            return super().get(name, shape, part)
        scales_name = f"{name}_scale_inv"
        self._need(scales_name, name)
        *outer, rows, columns = shape
        (height, width), grid = self.block, (-(-rows // self.block[0]), -(-columns // self.block[1]))
        scales = self.stored(scales_name, (*outer, *grid), (*VALUES, "F8_E8M0")).float()
        weights = self.stored(name, shape, ("F8_E4M3",), part)
        if part is not None and part.dim < len(outer):
            scales = scales.narrow(part.dim, part.start, part.stop - part.start)
        first_row = part.start if part is not None and part.dim == len(outer) else 0
        first_column = part.start if part is not None and part.dim == len(outer) + 1 else 0
        values = torch.empty(weights.shape, dtype=self.dtype)
        matrices = (t.reshape(-1, *t.shape[-2:]) for t in (weights, scales))
        for out, weight, scale in zip(values.view(-1, *values.shape[-2:]), *matrices, strict=True):
            down = (torch.arange(weight.shape[0]) + first_row) // height
            across = (torch.arange(weight.shape[1]) + first_column) // width
            for row in range(0, weight.shape[0], height):  # no more of the scales is spelled out at a time
                some = slice(row, row + height)
                out[some] = weight[some].float() * scale[down[some]][:, across]
        return values


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [N, G, 16] and [N, G] -> float32 [N, 32 G]."""
    halves = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
    pairs = torch.stack([halves.repeat(16), halves.repeat_interleave(16)], dim=1)  # [256, 2]: of each byte
    values = pairs.index_select(0, blocks.reshape(-1).int()).view(-1, _GROUP)
    factors = scales.reshape(-1, 1).view(torch.float8_e8m0fnu).float()
    return (values * factors).view(blocks.shape[0], -1)
