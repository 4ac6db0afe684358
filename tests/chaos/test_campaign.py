"""A very short campaign, of those whose death no other test sees. `bench/chaos.py` plays long ones with everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from campaign import run, stage
from service_process import idle, running, until

KINDS = ("supervisor", "controller", "redis")


@pytest.mark.timeout(900)
def test_no_stream_is_lost_and_no_token_differs(tmp_path: Path, text_model: Path) -> None:
    told, config = stage(text_model, None), tmp_path / "service.yaml"
    told["models"]["shared"]["replicas"] = 1  # of two ranks; its streams wait for it
    config.write_text(json.dumps(told))
    wanted = {name: model["replicas"] for name, model in told["models"].items()}
    with running(tmp_path, ["--config", str(config)]) as service:
        service.wait_until_ready()
        result = run(service, wanted, "", faults=len(KINDS), streams=6, seed=1, kinds=KINDS)
        assert result.tally.lost == []
        assert result.tally.wrong == []
        assert result.tally.finished > 0
        assert {t.kind for f in result.faults for t in f.targets} == set(KINDS)
        until(lambda: idle(service.status()))
        assert service.stop()[-1] == "understudy: stopped"
