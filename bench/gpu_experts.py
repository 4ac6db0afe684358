"""The grouped experts of one layer on one device: 64 experts, 8 per row. Part of `bench/gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from workers.kernels.ops import Ops

SHAPES = {"8b": (64, 8, 2048, 1024, (1, 16, 64, 512)), "tiny": (8, 2, 64, 32, (1, 5))}  # E, k, H, F, rows
Seconds = Callable[[Callable[[], object]], float]


def measure_experts(
    shape: str, modes: dict[str, Ops], best: dict[str, float], device: str, seconds: Seconds
) -> list[dict[str, Any]]:
    """Microseconds of one layer by rows and mode, and the share of the limit: each chosen expert's weights read once,
    or each multiplication done once, whichever takes longer."""
    experts, chosen, hidden, size, counts = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def weights(*sizes: int) -> list[torch.Tensor]:
        return [(torch.randn(sizes, generator=generator) * 0.02).bfloat16().to(device) for _ in range(experts)]

    gate, up, down = weights(size, hidden), weights(size, hidden), weights(hidden, size)
    packed = {mode: ops.experts(gate, up, down) for mode, ops in modes.items()}
    rows = []
    for count in counts:
        x = torch.randn(count, hidden, generator=generator).bfloat16().to(device)
        ids = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(count)])
        ids = ids.to(device, torch.int32)
        shares = torch.full((count, chosen), 1 / chosen, device=device)
        read = int(ids.unique().numel()) * 3 * hidden * size * 2 / best["bytes_per_s"]
        limit = max(read, 6 * count * chosen * hidden * size / best["flops"])
        row: dict[str, Any] = {"rows": count, "limit_us": 1e6 * limit}
        for mode, layer in packed.items():
            taken = seconds(lambda layer=layer, x=x, ids=ids, shares=shares: layer(x, ids, shares))
            row |= {f"{mode}_us": 1e6 * taken, f"{mode}_share": limit / taken}
        rows.append(row)
    return rows


def lines_of(rows: list[dict[str, Any]], shape: str) -> Iterator[str]:
    experts, chosen, hidden, size, _ = SHAPES[shape]
    yield f"one layer of {experts} experts, {chosen} per row, {hidden} x {size}; microseconds, and share of the limit"
    for row in rows:
        each = ", ".join(f"{m} {row[f'{m}_us']:,.0f} ({row[f'{m}_share']:.0%})" for m in ("fast", "exact"))
        yield f"  {row['rows']:>4} rows: {each}"
