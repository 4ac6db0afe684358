"""Prints the table of docs/models.md: every family's largest difference from transformers, over all of its cases.

    python tests/parity/table.py [plain | native]

Each case is a tiny random checkpoint in float32: a prompt of 41 tokens in chunks, beside another, then 64 greedy
tokens, which have to be those of `generate`; the difference is of any logit on the way.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from checkpoints import CASES, MODELS, check, make_model, open_runner
from dense import CASES as DENSE
from mixtures import CASES as MIXTURES
from mixtures import make_mixture


def difference(name: str, kernels: str) -> float:
    model = (make_mixture if name in MIXTURES else make_model)(name)
    with tempfile.TemporaryDirectory() as path, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(path)
        return check(model, open_runner(Path(path), kernels))


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kernels = sys.argv[1] if len(sys.argv) > 1 else "native"
    found: dict[str, list[float]] = {}
    for name, (family, _) in {**CASES, **DENSE, **MIXTURES}.items():
        found.setdefault(MODELS.get(family, f"{family}ForCausalLM"), []).append(difference(name, kernels))
    print(f"| reference class | shapes | largest difference of a logit, {kernels} |\n|---|---|---|")
    for architecture, values in found.items():
        print(f"| `{architecture}` | {len(values)} | {max(values):.1e} |")


if __name__ == "__main__":
    main()
