"""Tensors of a safetensors checkpoint, memory-mapped: only the bytes of what is asked for are ever read.

The format (one JSON header with dtype, shape and byte range of each tensor, then the bytes) is that of
https://github.com/huggingface/safetensors; several files are joined by `model.safetensors.index.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from understudy.errors import CheckpointError
from workers.model.spec import ModelSpec

log = logging.getLogger("understudy")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
VALUES = ("F32", "F16", "BF16")  # dtypes whose elements are what they stand for, without a scale
_MAX_HEADER = 100_000_000  # bytes; the format's own bound
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True, slots=True)
class Part:
    """Indices [start, stop) of axis `dim`: what one rank asks for of a tensor."""

    dim: int
    start: int
    stop: int


class TensorSource(Protocol):
    """Where a decoder's weights come from."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """The tensor, or the part of it, which may be a view of mapped memory: copy what is to stay.

        `shape` is that of the whole. Raises CheckpointError that names file and tensor.
        """


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes [start, stop) of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of one directory. Opening it reads and checks every header, and no tensor."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._maps: dict[Path, mmap.mmap] = {}
        self.entries = {name: entry for file in self._files() for name, entry in self._header(file)}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor as `get` gives it; 0 where there is none of that name."""
        entry = self.entries.get(name)
        return entry.stop - entry.start if entry else 0

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        return self.stored(name, shape, VALUES, part)

    def stored(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], part: Part | None = None) -> Tensor:
        """`get` of a tensor that may be of `dtypes` only, elements as they lie on disk."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.model_dir}: tensor {name} is missing from its {len(self._maps)} file(s)")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json implies {list(shape)}"
            )
        if entry.dtype not in dtypes:
            known = ", ".join(dtypes)
            raise CheckpointError(
                f"{entry.file}: tensor {name} has dtype {entry.dtype}; known are {known}, and scaled weights only "
                "where quantization_config in config.json says how"
            )
        self._used.add(name)
        whole = self._view(entry)
        return whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start)

    def _view(self, entry: Entry) -> Tensor:
        dtype, buffer = _DTYPES[entry.dtype], self._maps[entry.file]
        if entry.start % dtype.itemsize:  # the format allows it, aligned loads do not
            return torch.frombuffer(bytearray(buffer[entry.start : entry.stop]), dtype=dtype).view(entry.shape)
        count = (entry.stop - entry.start) // dtype.itemsize
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def log_unused(self) -> None:
        """Tensors that nobody asked for are tolerated: some checkpoints carry buffers or heads of their training."""
        for name in sorted(self.entries.keys() - self._used):
            log.debug("%s: tensor %s is not used", self.entries[name].file, name)

    def fingerprint(self, spec: ModelSpec) -> str:
        """SHA-256, in hex, of what decides this model's tokens; equal for copies of one checkpoint.

        Covers the spec (so that the old and the new form of config.json are one model), and of each tensor, by name:
        dtype, shape and bytes. Of a tensor above 64 KiB, 16 samples of 4 KiB are taken, evenly spread, the first
        and the last included: training or damage changes far more than it could miss, and no 16 GB are read.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(asdict(spec), sort_keys=True).encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"\n{name} {entry.dtype} {entry.shape}\n".encode())
            buffer = memoryview(self._maps[entry.file])[entry.start : entry.stop]
            if len(buffer) <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(buffer)
                continue
            for i in range(_SAMPLES):
                at = i * (len(buffer) - _SAMPLE_BYTES) // (_SAMPLES - 1)
                digest.update(buffer[at : at + _SAMPLE_BYTES])
        return digest.hexdigest()

    # Reading files -------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        index = self.model_dir / INDEX
        if not index.is_file():
            if not (self.model_dir / SINGLE).is_file():
                raise CheckpointError(f"{self.model_dir}: holds neither {SINGLE} nor {INDEX}")
            return [self.model_dir / SINGLE]
        try:
            names = json.loads(index.read_bytes())["weight_map"].values()
            files = [self.model_dir / name for name in dict.fromkeys(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is not an index with a weight_map of names: {error!r}") from error
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file, though {INDEX} names it")
        return files

    def _header(self, file: Path) -> Iterator[tuple[str, Entry]]:
        size = file.stat().st_size
        if size < 8:
            raise CheckpointError(f"{file}: has {size} bytes, too few for safetensors")
        with file.open("rb") as stream:
            # Private and writable, because torch warns of read-only memory; nothing writes to it.
            self._maps[file] = mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack_from("<Q", mapped)
        if length > _MAX_HEADER:
            raise CheckpointError(f"{file}: its header claims {length} bytes; this is not safetensors")
        data = 8 + length
        if data > size:
            raise CheckpointError(f"{file}: is truncated: the header needs {data} bytes, the file has {size}")
        try:
            header: dict[str, Any] = json.loads(mapped[8:data])
            header.pop("__metadata__", None)
            found = [(name, _entry(file, data, value)) for name, value in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{file}: its header is damaged: {error!r}") from error
        for name, entry in found:
            _check(name, entry, data, size)
        return iter(found)


def _entry(file: Path, data: int, value: dict[str, Any]) -> Entry:
    start, stop = value["data_offsets"]
    return Entry(file, str(value["dtype"]), tuple(int(n) for n in value["shape"]), data + int(start), data + int(stop))


def _check(name: str, entry: Entry, data: int, size: int) -> None:
    if entry.stop > size:
        raise CheckpointError(
            f"{entry.file}: is truncated: tensor {name} ends at byte {entry.stop}, the file has {size}"
        )
    dtype = _DTYPES.get(entry.dtype)
    count = 1
    for n in entry.shape:
        count *= n
    length = entry.stop - entry.start
    if entry.start < data or length < 0 or (dtype is not None and length != count * dtype.itemsize):
        raise CheckpointError(
            f"{entry.file}: its header is damaged: tensor {name} of dtype {entry.dtype} and shape "
            f"{list(entry.shape)} lies in {length} bytes"
        )
