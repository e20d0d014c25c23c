"""A pseudo-random permutation with O(1) access: any position of an epoch's order is computed, none is stored.

A Feistel network over the smallest 2^(2 h) >= n numbers, keyed by BLAKE2; where it leaves [0, n) it is applied again ("cycle walking"),
which keeps it a permutation of [0, n). Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, sections 3 and 4.
"""

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


def permute(positions: NDArray[np.int64], count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where the key's permutation of [0, count) sends each of `positions`, which lie in it; at most four walks on average."""
    if count <= 1:
        return np.zeros_like(positions)
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    keys = _keys(key)
    found = _network(positions.astype(np.uint64), np.uint64(half), keys)
    outside = found >= count
    while outside.any():
        found[outside] = _network(found[outside], np.uint64(half), keys)
        outside = found >= count
    return found.astype(np.int64)


def _keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    """One 64-bit number a round, the same on every machine."""
    text = ",".join(map(str, key)).encode()
    return np.array(struct.unpack(f"<{ROUNDS}Q", hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()), np.uint64)


def _network(numbers: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Feistel rounds on the upper and the lower `half` bits."""
    mask = np.uint64((1 << int(half)) - 1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014, figure 16)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
