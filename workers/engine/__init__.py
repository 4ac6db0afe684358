"""The engine: token ids in, one message per step out. Importing this brings neither torch nor Ray nor gRPC."""

from workers.engine.contract import (
    Engine,
    EngineConfig,
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    Sampling,
    SequenceOutput,
    StepOutput,
    TokenLogprob,
)

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "Request",
    "Sampling",
    "SequenceOutput",
    "StepOutput",
    "TokenLogprob",
]
