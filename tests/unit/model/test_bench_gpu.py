"""The GPU bench runs where no GPU is: its dry mode, and its refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=250, check=False
    )


def test_dry_mode(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--threads", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["measure"], row["sequences"]) for row in report["rows"]] == [
        (measure, count) for count in (1, 3) for measure in ("prefill", "decode")
    ]
    assert all(row[who] > 0 for row in report["rows"] for who in ("fast", "exact", "transformers", "limit"))
    assert report["row_law"]["exact"]
    assert [row["rows"] for row in report["experts"]] == [1, 5]
    assert all(row[f"{mode}_us"] > 0 for row in report["experts"] for mode in ("fast", "exact"))
    for found in report["parity"].values():
        assert found["tokens_equal"]
        assert found["max_logit_difference"] < 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
