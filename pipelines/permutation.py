"""A shuffle of 0 .. count-1 any part of which can be computed alone, in memory that does not grow with `count`.

A block cipher is a permutation chosen by a key. This one is a Feistel network as wide as count - 1 in binary; a result
that is not below `count` is enciphered again until it is ("cycle walking", Black & Rogaway 2002), two passes at most on
average. TensorFlow's `random_index_shuffle` does the same for one index at a time; this one computes a whole batch of
positions at once.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

KEYS = 24
"""Words of a key: one a round."""
_WIDE_BITS = 8
_WIDE_ROUNDS = 10
# From 128 elements on, ten rounds as in FF1 (NIST SP 800-38G). Below, the halves have few bits, and it takes all 24 to
# make all orders equally frequent.


class Permutation:
    """`permutation[positions]` is what stands at the positions, int64, for an array of integers or a slice."""

    def __init__(self, count: int, keys: NDArray[np.uint64]) -> None:
        """The permutation of 0 .. count-1 that `keys`, uint64 (KEYS,), choose."""
        assert 0 <= count <= 1 << 62
        assert keys.shape == (KEYS,)
        self._count = count
        bits = max((count - 1).bit_length(), 2)
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits
        self._keys = list(keys[: KEYS if bits < _WIDE_BITS else _WIDE_ROUNDS])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, positions: slice | ArrayLike) -> NDArray[np.int64]:
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(self._count))
        positions = np.asarray(positions)
        if positions.size and not (positions.min() >= 0 and positions.max() < self._count):
            raise IndexError(f"positions must be in 0..{self._count - 1}, got {positions.min()}..{positions.max()}")
        found = self._encipher(positions.astype(np.uint64).ravel())
        outside = np.flatnonzero(found >= self._count)
        while len(outside):
            found[outside] = again = self._encipher(found[outside])
            outside = outside[again >= self._count]
        return found.astype(np.int64).reshape(positions.shape)

    def _encipher(self, blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = blocks >> np.uint64(self._low_bits), blocks & np.uint64((1 << self._low_bits) - 1)
        for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
            high ^= _mixed(low, even, self._high_bits)
            low ^= _mixed(high, odd, self._low_bits)
        return (high << np.uint64(self._low_bits)) | low


def _mixed(half: NDArray[np.uint64], key: np.uint64, bits: int) -> NDArray[np.uint64]:
    """So many bits, each of which depends on all bits of half and key: the upper ones of MurmurHash3's finalizer."""
    word = half ^ key
    word ^= word >> np.uint64(33)
    word *= np.uint64(0xFF51AFD7ED558CCD)
    word ^= word >> np.uint64(33)
    word *= np.uint64(0xC4CEB9FE1A85EC53)
    word >>= np.uint64(64 - bits)
    return word
