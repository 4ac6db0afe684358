"""The canonical name of a KV block: what it was computed from, and how.

key(block) = SHA-256(key(parent) || token ids of the block, 4 bytes each, little-endian); the parent of a prompt's
first block is the root, SHA-256 over everything else that decides a block's bytes. Never Python's `hash`: keys are
equal in every process, so that a router, a replica and a store mean the same block by the same name.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import sha256

LAYOUT_VERSION = 1  # of a stored block's bytes; a change makes every older block a miss
KEY_BYTES = 32


def root_key(
    model_fingerprint: str, dtype: str, numerics_id: str, salt: str = "", layout: int = LAYOUT_VERSION
) -> bytes:
    """The parent of first blocks. `salt` is the tenant's: without it nobody can find, or time, another's prefixes."""
    digest = sha256(b"understudy kv block\0")
    for part in (model_fingerprint, dtype, str(layout), salt, numerics_id):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))  # so that no two lists of parts run together alike
        digest.update(data)
    return digest.digest()


def prompt_root(
    model_fingerprint: str, dtype: str, numerics_id: str, salt: str, prompt_tokens: int, long_prompt: int
) -> bytes:
    """`root_key` of a prompt of so many tokens: those of more than `long_prompt` (0: no such bound) are computed
    otherwise, and share no blocks with others."""
    long = 0 < long_prompt < prompt_tokens
    return root_key(model_fingerprint, dtype, numerics_id + ("/long-prompt" if long else ""), salt)


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block of `tokens` after the block `parent`."""
    return sha256(parent + _little_endian(tokens)).digest()


def block_keys(root: bytes, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of all full blocks of `tokens`, first block first; a tail shorter than a block has none."""
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, block_tokens)
    return keys


def extend_keys(keys: list[bytes], root: bytes, tokens: Sequence[int], block_tokens: int) -> None:
    """Appends the keys of the full blocks of `tokens` that `keys` lacks."""
    parent, had = keys[-1] if keys else root, len(keys)
    full = len(tokens) // block_tokens
    if full <= had:
        return
    data, size = _little_endian(tokens[had * block_tokens : full * block_tokens]), 4 * block_tokens
    for start in range(0, len(data), size):
        parent = sha256(parent + data[start : start + size]).digest()
        keys.append(parent)


def _little_endian(tokens: Sequence[int]) -> bytes:
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
