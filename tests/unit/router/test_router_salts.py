"""Who shares cached prefixes with whom: the salt of an identity, and keys that follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.interceptors import Tokens
from router.validate import _salt
from understudy.errors import ConfigError
from understudy.v1 import inference_pb2 as pb
from workers.cache.keys import block_keys, root_key


def read(path: Path, text: str) -> Tokens:
    file = path / "tokens"
    file.write_text(text)
    return Tokens.read(file)


def keys(salt: str, own: str = "") -> set[bytes]:
    root = root_key("model", "bfloat16", "numerics", _salt(pb.KvOptions(cache_salt=own), salt))
    return set(block_keys(root, list(range(320)), 16))


def test_tenants_share_where_their_salts_are_equal(tmp_path: Path):
    tokens = read(tmp_path, "t1 red\nt2 blue\nt3 green team\nt4 green team\n# t5 red team\nt6 gold team\n")
    assert [tokens.tenant(f"t{i}") for i in (1, 2, 3, 4, 5, 6)] == ["red", "blue", "green", "green", None, "gold"]
    salts = {tenant: tokens.salt(tenant) for tenant in ("red", "blue", "green", "gold")}
    assert salts["green"] == salts["gold"]
    assert len({salts["red"], salts["blue"], salts["green"]}) == 3


def test_a_salt_is_never_a_tenants_name(tmp_path: Path):
    tokens = read(tmp_path, "t1 red\nt2 blue red\n")
    assert tokens.salt("blue") != tokens.salt("red") == "red"


def test_key_sets_are_disjoint(tmp_path: Path):
    tokens = read(tmp_path, "t1 red\nt2 blue\nt3 green team\nt4 gold team\n")
    sets = [keys(tokens.salt(t)) for t in ("red", "blue", "green")] + [
        keys("red", "mine"),
        keys("blue", "mine"),
        keys(""),
    ]
    assert all(len(s) == 20 for s in sets)
    assert len(set().union(*sets)) == 6 * 20
    assert keys(tokens.salt("green")) == keys(tokens.salt("gold"))
    assert keys(tokens.salt("green"), "mine") == keys(tokens.salt("gold"), "mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("t1\n", "line 1: has 1 words; write TOKEN TENANT"),
        ("t1 a b c\n", "line 1: has 4 words"),
        ("t1 red\n\nt2 red team\n", "line 3: the tenant red has another salt above"),
        ("t1 red x\nt2 red y\n", "line 2: the tenant red has another salt above"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)
