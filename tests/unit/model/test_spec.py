"""What a config.json means, in its old and its new form."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import CONFIG

from workers.model.config import parse_config
from workers.model.spec import Attention, CacheGroup, DenseFfn, MoeFfn, Norm, Rope, Route


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """CONFIG with changes; the value DROP removes a key."""
    merged = CONFIG | {"architectures": [architecture]} | changes
    return {key: value for key, value in merged.items() if value is not DROP}


DROP = object()


def test_llama() -> None:
    spec = parse_config(config())
    assert spec.attention == Attention(heads=4, kv_heads=2, head_dim=4)
    assert spec.ffn == (DenseFfn(24), DenseFfn(24))
    assert spec.groups == (CacheGroup(None, (0, 1)),)
    assert (spec.rope, spec.dtype, spec.norm) == ((Rope(10000.0),) * 2, "float32", Norm(eps=1e-5))
    assert not spec.tie_embeddings


def test_biases_of_llama() -> None:
    spec = parse_config(config(attention_bias=True, mlp_bias=True))
    assert spec.attention.qkv_bias
    assert spec.attention.out_bias
    assert spec.ffn[0] == DenseFfn(24, bias=True)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | LLAMA3},
        {"rope_theta": DROP, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "llama3"} | LLAMA3, "rope_scaling": None},
    ],
)
def test_both_forms_of_rope(form: dict[str, Any]) -> None:
    assert parse_config(config(**form)).rope[0] == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("architecture", "theta"), [("LlamaForCausalLM", 1e4), ("Qwen2ForCausalLM", 1e4), ("MixtralForCausalLM", 1e6)]
)
def test_theta_where_none_is_given(architecture: str, theta: float) -> None:
    given_keys = config(architecture, rope_theta=DROP, num_key_value_heads=2)
    assert parse_config(given_keys).rope == (Rope(theta),) * 2


@pytest.mark.parametrize("form", [{"dtype": "bfloat16", "torch_dtype": DROP}, {"torch_dtype": "bfloat16"}])
def test_both_forms_of_dtype(form: dict[str, Any]) -> None:
    assert parse_config(config(**form)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "window"),
    [({}, 4096), ({"sliding_window": 256}, 256), ({"sliding_window": None}, None), ({"sliding_window": 9000}, None)],
)
def test_windows_of_mistral(changes: dict[str, Any], window: int | None) -> None:
    """Absent means the family's default; a window as long as the context is none."""
    spec = parse_config(config("MistralForCausalLM", max_position_embeddings=8192, **changes))
    assert spec.groups == (CacheGroup(window, (0, 1)),)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({"sliding_window": 8}, ((None, (0, 1, 2)),)),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, ((None, (0,)), (8, (1, 2)))),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, ((8, (0, 1, 2)),)),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, ((None, (0, 1, 2)),)),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            ((8, (0, 2)), (None, (1,))),
        ),
    ],
)
def test_groups_of_qwen(architecture: str, changes: dict[str, Any], groups: tuple[Any, ...]) -> None:
    spec = parse_config(config(architecture, num_hidden_layers=3, **changes))
    assert spec.groups == tuple(CacheGroup(*group) for group in groups)
    assert all(i in spec.groups[group].layers for i, group in enumerate(spec.layer_group))


def test_features_of_the_qwen_families() -> None:
    assert parse_config(config("Qwen2ForCausalLM")).attention == Attention(4, 2, 4, qkv_bias=True)
    assert parse_config(config("Qwen3ForCausalLM")).attention == Attention(4, 2, 128, qk_norm="head")
    assert parse_config(config("Qwen3ForCausalLM", head_dim=8)).attention.head_dim == 8


def test_mixtral() -> None:
    spec = parse_config(config("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=DROP))
    assert spec.ffn[1] == MoeFfn(24, 4, Route(2), names="mixtral")
    assert spec.norm.eps == 1e-5


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [True] * 4),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"mlp_only_layers": [0, 3]}, [False, True, True, False]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
    ],
)
def test_qwen3_moe(key: str, changes: dict[str, Any], sparse: list[bool]) -> None:
    sizes = {key: 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
    spec = parse_config(config("Qwen3MoeForCausalLM", num_hidden_layers=4, **sizes, **changes))
    assert spec.ffn == tuple(MoeFfn(12, 8, Route(3)) if s else DenseFfn(24) for s in sparse)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=12))
def test_groups_share_out_the_layers(types: list[str]) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": len(types), "layer_types": types}
    spec = parse_config(config("Qwen2ForCausalLM", **changes))
    assert sorted(i for group in spec.groups for i in group.layers) == list(range(len(types)))
    assert len({group.window for group in spec.groups}) == len(spec.groups)
    for kind, group in zip(types, spec.layer_group, strict=True):
        assert spec.groups[group].window == (8 if kind == "sliding_attention" else None)


def test_the_spec_is_read_without_torch() -> None:
    code = "import sys, workers.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
