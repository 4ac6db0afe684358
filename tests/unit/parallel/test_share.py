"""Who holds what: every head, column, expert and token at exactly those ranks that should have it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from understudy.errors import ConfigError
from workers.model.config import parse_config
from workers.model.spec import Attention, Latent, ModelSpec
from workers.parallel.group import tree_sum
from workers.parallel.share import Share, check_degree, misfit, tree, tree_parts


def llama(**changes: object) -> ModelSpec:
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 144, "intermediate_size": 96}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 12, "num_key_value_heads": 4}
    config |= {"torch_dtype": "float32", "max_position_embeddings": 64}
    return parse_config(config | changes)


def mixtral(**changes: object) -> ModelSpec:
    return llama(architectures=["MixtralForCausalLM"], num_local_experts=6, num_experts_per_tok=2, **changes)


@given(st.integers(0, 500), st.integers(1, 16))
def test_things_that_need_not_divide_are_each_at_one_rank(count: int, size: int) -> None:
    shares = [Share(rank, size).some(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares)), "what is gathered is filled up to the first rank's"


@given(st.integers(0, 4), st.integers(1, 12), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_query_head_has_its_kv_head(log_kv: int, per_kv: int, size: int) -> None:
    kv = 2**log_kv
    a = Attention(heads=kv * per_kv, kv_heads=kv, head_dim=8)
    if a.heads % size:
        return
    for rank in range(size):
        share = Share(rank, size)
        mine, held = share.even(a.heads), share.kv_heads(a)
        assert {head // per_kv for head in mine} <= set(held)
        assert share.attention(a).heads == len(mine)
        assert share.attention(a).kv_heads == len(held)


def test_latents_are_held_by_all() -> None:
    a = Attention(heads=8, kv_heads=8, head_dim=24, latent=Latent(rank=32, rope_dim=8, nope_dim=16, value_dim=16))
    share = Share(1, 4)
    assert (share.kv_heads(a), share.attention(a).heads, share.attention(a).cache_dim) == (range(1), 2, 40)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.integers(0, 2**31))
def test_the_tree_of_all_parts_is_the_tree_of_ranks_over_their_own(size: int, each: int, seed: int) -> None:
    """What makes the invariant option invariant."""
    units = 8 * each
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) * 1e3
    parts = [Share(rank, size, invariant=True).summed(units) for rank in range(size)]
    assert [unit for rank in parts for part in rank for unit in part] == list(range(units))
    assert sum(map(len, parts)) == tree_parts(units) == 8
    of_rank = [values[8 // size * rank : 8 // size * (rank + 1)] for rank in range(size)]
    assert torch.equal(tree_sum([tree_sum(list(some)) for some in of_rank]), tree_sum(list(values)))


@given(st.integers(1, 40))
def test_a_tree_adds_every_part_once(count: int) -> None:
    pairs = list(tree(count))
    assert sorted(b for _, b in pairs) == list(range(1, count))
    gone: set[int] = set()
    for a, b in pairs:
        assert a < b
        assert not {a, b} & gone
        gone.add(b)


def test_wrong_degrees_are_refused_with_the_numbers_and_what_works() -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel: 5 ranks .* 12 query heads .* work: 1, 2, 4, 12"):
        check_degree(llama(), 5, key="--tensor-parallel")
    with pytest.raises(ConfigError, match="0 is below 1"):
        check_degree(llama(), 0)
    with pytest.raises(ConfigError, match=r"4 KV heads can neither be divided nor repeated"):
        check_degree(llama(), 6)
    with pytest.raises(ConfigError, match=r"a feed-forward of 90 columns"):
        check_degree(llama(intermediate_size=90), 4)
    with pytest.raises(ConfigError, match=r"12 query heads make 4 parts of the invariant sum; .* work: 1, 2, 4"):
        check_degree(llama(num_attention_heads=12, num_key_value_heads=12), 12, invariant=True)
    with pytest.raises(ConfigError, match=r"6 experts, fewer than ranks; .* work: 2, 3, 4, 6"):
        check_degree(mixtral(num_key_value_heads=12), 12, whole_experts=True)
    with pytest.raises(ConfigError, match=r"expert_parallel: LlamaForCausalLM has no experts"):
        check_degree(llama(), 2, whole_experts=True)
    with pytest.raises(ConfigError, match=r"an expert of 96 columns"):
        check_degree(mixtral(num_attention_heads=18, num_key_value_heads=18), 9)
    assert misfit(mixtral(num_attention_heads=18, num_key_value_heads=18), 6, whole_experts=True) == ""
    for size in (1, 2, 4):
        check_degree(llama(), size, invariant=True)
