"""Chat with the bundled model: its own template, markers and engine."""

from __future__ import annotations

from pathlib import Path

from router_stage import Stage

from router.fakes import FakeReplica
from router.models import TEXT_FILES, ServedModel
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineConfig
from workers.engine.build import build_engine


async def test_the_bundled_model_talks_and_thinks(stage: Stage, demo_model: Path) -> None:
    engine = build_engine(EngineConfig(str(demo_model), "demo", dtype="float32", threads=1, cache_bytes=64 << 20))
    replica = FakeReplica("real", engine)
    stage.router.add(replica)
    gateway = await stage.open(serve_models=False)
    files = {n: (demo_model / n).read_bytes() for n in (*TEXT_FILES, "chat_template.jinja")}
    model = ServedModel.from_files(engine.info, files)
    gateway.put_model(model)
    formats = model.chat_formats
    assert (formats.tools, formats.reasoning, formats.switch) == ("hermes", "think", True)

    async def said(effort: int, budget: int | None = None) -> tuple[str, str, pb.Finish]:
        message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text="Who are you?")])
        request = pb.ChatRequest(messages=[message], sampling=pb.Sampling(temperature=0), reasoning={"effort": effort})
        request.stopping.max_tokens = 60
        if budget is not None:
            request.reasoning.budget_tokens = budget
        messages = [m async for m in stage.stub.Chat(request)]
        deltas = [m.delta for m in messages if m.HasField("delta")]
        return "".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), messages[-1].finish

    text, thought, finish = await said(pb.REASONING_EFFORT_NONE)
    assert "Understudy" in text
    assert (thought, finish.usage.reasoning_tokens, finish.reason) == ("", 0, pb.FINISH_REASON_EOS)
    text, thought, finish = await said(pb.REASONING_EFFORT_HIGH)
    assert text
    assert thought
    assert "<think>" not in text + thought
    assert 0 < finish.usage.reasoning_tokens < finish.usage.completion_tokens
    cut, short, finish = await said(pb.REASONING_EFFORT_HIGH, budget=3)
    assert cut
    assert 0 < len(short) < len(thought)
    assert finish.usage.reasoning_tokens == 4  # three, and the marker that was forced
    replica.stop()
    engine.check_idle()
