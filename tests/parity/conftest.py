from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import make_model
from mixtures import CASES as MIXTURES
from mixtures import make_mixture


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """Writes a case's checkpoint once: (the model in memory, its directory)."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def write(name: str) -> tuple[transformers.PreTrainedModel, Path]:
        if name not in made:
            make = make_mixture if name in MIXTURES else make_model
            model, path = make(name), tmp_path_factory.mktemp(name)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                model.save_pretrained(path)
            made[name] = model, path
        return made[name]

    return write
