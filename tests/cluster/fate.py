"""A fault that a service's engines are given: a request that they die of."""

from __future__ import annotations

import os
from pathlib import Path

POISON = [7, 11, 13]  # the prompt
# Read by every Python process of the service as it starts. Stands for a fault of the machine or of a kernel.
FATE = f"""
import importlib.abc, importlib.util, os, signal, sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "workers.engine.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_doom(module):
            load(module)
            doom(module.EngineCore)

        spec.loader.exec_module = load_and_doom
        return spec


def doom(engine):
    add, step, doomed = engine.add, engine.step, []

    def add_and_see(self, request):
        add(self, request)
        if list(request.prompt) == {POISON}:
            doomed.append(0)

    def step_or_die(self):
        if doomed:
            doomed.append(0)
        if len(doomed) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    engine.add, engine.step = add_and_see, step_or_die


sys.meta_path.insert(0, Finder())
"""


def environment(place: Path) -> dict[str, str]:
    """For a service whose engines are to have it."""
    folder = place / "fate"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FATE)
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([others] if others else [])])}
