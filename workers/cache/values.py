"""The values of the prefix store: what one block holds of one KV head, over all layers of a cache group, as bytes.

A value belongs to no tensor-parallel layout: heads have their absolute index, and the payload is in the canonical
order of `workers.kernels.ops.KvCache`. It begins with 64 bytes, little-endian:

    offset  0  4 bytes   b"UKVB"
            4  uint16    layout version: `workers.cache.keys.LAYOUT_VERSION`
            6  uint16    1 where the digest is keyed, else 0
            8  uint32    bytes of the payload that follows
           12  uint16    cache group
           14  uint16    KV head, absolute
           16  32 bytes  the block's key
           48  16 bytes  digest of the 48 bytes before and of the payload: XXH3-128, or HMAC-SHA256 cut to 16 bytes

XXH3 finds damage; only the keyed digest keeps out somebody who can write to the store. The digest covers key and head,
so that a value under another's name does not verify. Whatever does not verify is a miss.
"""

from __future__ import annotations

import hmac
import struct
from typing import Protocol

import xxhash

from workers.cache.keys import LAYOUT_VERSION

MAGIC = b"UKVB"
HEADER_BYTES = 64
DIGEST_BYTES = 16
_FRONT = struct.Struct("<4sHHIHH32s")
_DIGEST_AT = HEADER_BYTES - DIGEST_BYTES


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class Seal:
    """Writes and checks headers. `secret` (not empty) keys the digest: values without it, or of another, are misses."""

    def __init__(self, secret: bytes | None = None) -> None:
        if secret is not None and len(secret) < 16:
            raise ValueError(f"the store's key has {len(secret)} bytes; at least 16 are wanted")
        self._secret = secret

    def write(self, value: memoryview, key: bytes, group: int, head: int) -> None:
        """Fills in the header of `value`, whose payload is there."""
        front = self._front(len(value) - HEADER_BYTES, key, group, head)
        value[:_DIGEST_AT] = front
        value[_DIGEST_AT:HEADER_BYTES] = self._digest(front, value)

    def verifies(self, value: memoryview, key: bytes, group: int, head: int) -> bool:
        """Whether `value` is what its name says, in this layout, undamaged, and of this cluster."""
        front = self._front(len(value) - HEADER_BYTES, key, group, head)
        return value[:_DIGEST_AT] == front and hmac.compare_digest(
            self._digest(front, value), bytes(value[_DIGEST_AT:HEADER_BYTES])
        )

    def _front(self, payload: int, key: bytes, group: int, head: int) -> bytes:
        return _FRONT.pack(MAGIC, LAYOUT_VERSION, int(self._secret is not None), payload, group, head, key)

    def _digest(self, front: bytes, value: memoryview) -> bytes:
        made: _Hash = xxhash.xxh3_128() if self._secret is None else hmac.new(self._secret, digestmod="sha256")
        made.update(front)
        made.update(value[HEADER_BYTES:])
        return made.digest()[:DIGEST_BYTES]


def value_name(key: bytes, group: int, head: int) -> bytes:
    """A value's name in the store. The braces keep all values of a block in one slot of a Redis Cluster."""
    return b"ukv%d:{%s}:%d:%d" % (LAYOUT_VERSION, key.hex().encode(), group, head)
