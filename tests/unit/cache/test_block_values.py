"""Headers of stored values: whatever is not exactly what its name says does not verify."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.cache import values
from workers.cache.keys import LAYOUT_VERSION
from workers.cache.values import HEADER_BYTES, Seal, value_name

SECRET = b"a secret of this cluster"


def sealed(
    seal: Seal, key: bytes = b"k" * 32, group: int = 1, head: int = 5, size: int = 96, seed: int = 0
) -> bytearray:
    value = bytearray(HEADER_BYTES) + random.Random(seed).randbytes(size)
    seal.write(memoryview(value), key, group, head)
    return value


def verifies(seal: Seal, value: bytes, key: bytes = b"k" * 32, group: int = 1, head: int = 5) -> bool:
    return seal.verifies(memoryview(value), key, group, head)


@pytest.fixture(params=[None, SECRET], ids=["checksum", "hmac"])
def seal(request: pytest.FixtureRequest) -> Seal:
    return Seal(request.param)


def test_a_header_is_what_its_file_describes():
    value = sealed(Seal())
    front = struct.pack("<4sHHIHH32s", b"UKVB", LAYOUT_VERSION, 0, 96, 1, 5, b"k" * 32)
    assert value[:48] == front
    assert len(value) == HEADER_BYTES + 96
    assert verifies(Seal(), value)
    assert sealed(Seal(SECRET))[6:8] == b"\1\0"


@given(bit=st.integers(0, (HEADER_BYTES + 96) * 8 - 1), secret=st.booleans())
def test_one_bit_is_enough(bit: int, secret: bool):
    seal = Seal(SECRET if secret else None)
    value = sealed(seal)
    value[bit // 8] ^= 1 << bit % 8
    assert not verifies(seal, value)


def test_another_name_is_another_value(seal: Seal):
    value = sealed(seal)
    assert verifies(seal, value)
    assert not verifies(seal, value, key=b"j" * 32)
    assert not verifies(seal, value, group=0)
    assert not verifies(seal, value, head=4)
    renamed = bytearray(value)
    renamed[14] = 4  # the header says so too
    assert not verifies(seal, renamed, head=4)


def test_lengths_count(seal: Seal):
    value = sealed(seal)
    assert not verifies(seal, value[:-16])
    assert not verifies(seal, value + bytes(16))
    short = value[: HEADER_BYTES + 80]
    short[8:12] = struct.pack("<I", 80)
    assert not verifies(seal, short)
    assert not verifies(seal, bytearray(len(value)))


def test_an_older_layout_is_a_miss(seal: Seal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(values, "LAYOUT_VERSION", LAYOUT_VERSION - 1)
    old, name = sealed(seal), value_name(b"k" * 32, 1, 5)
    monkeypatch.undo()
    assert not verifies(seal, old)
    assert name != value_name(b"k" * 32, 1, 5)


def test_secrets_keep_others_out():
    mine, others, open_ = Seal(SECRET), Seal(b"another cluster's secret"), Seal()
    for a in (mine, others, open_):
        for b in (mine, others, open_):
            assert verifies(b, sealed(a)) == (a is b)
    forged = sealed(open_)
    forged[6] = 1  # a checksum that says it is keyed
    assert not verifies(mine, forged)
    with pytest.raises(ValueError, match="has 5 bytes; at least 16"):
        Seal(b"short")


def test_names_of_a_block_share_a_slot():
    names = {value_name(bytes([i]) * 32, group, head) for i in range(3) for group in range(2) for head in range(12)}
    assert len(names) == 72
    tags = {name[name.index(b"{") : name.index(b"}")] for name in names}
    assert len(tags) == 3
