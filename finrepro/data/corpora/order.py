"""A pseudo-random permutation with O(1) access: any position of an epoch's order is computed, none
is stored.

A Feistel network over pairs (l, r) of [0, a) x [0, b), keyed by BLAKE2, with a b >= n as small as
it may be: in turn l becomes l + F(r) mod a and r becomes r + F(l) mod b, which can be undone. Where
it leaves [0, n) it is applied again ("cycle walking"), which keeps it a permutation of [0, n).
Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, sections 4 and 5.
"""

import hashlib
import math
import struct

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
Numbers = NDArray[np.uint64]


def permute(positions: NDArray[np.int64], count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """The images of `positions`, which lie in [0, count), under the key's permutation of it. More
    than one walk is rare.
    """
    side = math.isqrt(max(count, 1) - 1) + 1  # a; then b is the smallest with a b >= count
    sides = (np.uint64(side), np.uint64(-(-count // side)))
    keys = _keys(key)
    images = _network(positions.astype(np.uint64), sides, keys)
    outside = images >= count
    while outside.any():
        images[outside] = _network(images[outside], sides, keys)
        outside = images >= count
    return images.astype(np.int64)


def _keys(key: tuple[int, ...]) -> Numbers:
    """One 64-bit number a round, the same on every machine."""
    text = ",".join(map(str, key)).encode()
    return np.array(
        struct.unpack(f"<{ROUNDS}Q", hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()),
        np.uint64,
    )


def _network(numbers: Numbers, sides: tuple[np.uint64, np.uint64], keys: Numbers) -> Numbers:
    """Feistel rounds on the pair (l, r) of quotient and remainder by the second side."""
    high, low = np.divmod(numbers, sides[1])
    for number, key in enumerate(keys):
        if number % 2:
            low = (low + _mixed(high + key) % sides[1]) % sides[1]
        else:
            high = (high + _mixed(low + key) % sides[0]) % sides[0]
    return high * sides[1] + low


def _mixed(x: Numbers) -> Numbers:
    """Every bit of the result depends on every bit of x: the finalizer of SplitMix64 (Steele et
    al., OOPSLA 2014, figure 16).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
