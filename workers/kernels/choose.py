"""Which operations a device and a dtype get."""

from __future__ import annotations

import logging

import torch

from understudy.errors import ConfigError
from workers.kernels.ops import Ops
from workers.kernels.plain import PlainOps

log = logging.getLogger("understudy")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_ops(dtype: str, device: str = "cpu", kernels: str = "auto", threads: int | None = None) -> Ops:
    """Operations for one dtype (a key of DTYPES) on one device ("cpu", "cuda", "cuda:1", ...).

    `kernels`: "native" is ours in C++ or ConfigError with the reason; "plain" is torch alone; "auto" is native
    where it builds, else plain with a warning that says why not. On CUDA "auto" and "plain" keep the row law, and
    "fast" gives it up for speed. `threads` of computation; None leaves torch's.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if kernels not in ("auto", "native", "plain", "fast"):
        raise ConfigError(f"kernels: {kernels!r} is not one of auto, native, plain, fast")
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads: {threads} is below 1")
        torch.set_num_threads(threads)
    if device.split(":", maxsplit=1)[0] == "cuda":
        return _cuda(DTYPES[dtype], device, kernels)
    if device != "cpu":
        raise ConfigError(f"device: {device!r} is neither cpu nor cuda[:N]")
    if kernels == "fast":
        raise ConfigError("kernels: fast is for CUDA; on the CPU the fast kernels are exact, leave it at auto")
    if kernels == "plain":
        return PlainOps(DTYPES[dtype])
    return _native(DTYPES[dtype], kernels, threads)


def _cuda(dtype: torch.dtype, device: str, kernels: str) -> Ops:
    from workers.kernels.cuda import CudaOps

    if kernels == "native":
        raise ConfigError(
            "kernels: native is for the CPU; leave it at auto on a CUDA device, or give up exactness with fast"
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r}, but torch {torch.__version__} sees no CUDA device here")
    return CudaOps(dtype, device, exact=kernels != "fast")


def _native(dtype: torch.dtype, kernels: str, threads: int | None) -> Ops:
    from workers.kernels.build import BuildError
    from workers.kernels.native import NativeOps

    try:
        return NativeOps(dtype, threads=threads)
    except BuildError as reason:
        if kernels == "native":
            raise ConfigError(f"kernels: native cannot be had here: {reason}") from reason
        log.warning("native kernels cannot be had here, using plain torch, many times slower: %s", reason)
        return PlainOps(dtype)
