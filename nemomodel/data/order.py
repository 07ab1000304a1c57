"""Which window of which source is sample number n: pure functions, no state, no tables.

Everything is integer arithmetic on 64 bits, so the order is the same on every machine and with
every numpy version.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BLOCK = 4096
"""Global samples within which the shares of a blend are met to one sample."""

ROUNDS = 6
"""Feistel rounds; four already are indistinguishable from random to a bounded observer."""


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that is unrelated for any two different `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Where a keyed pseudo-random permutation of range(size) sends each entry of `index`.

    A Feistel network permutes the next even power of two; entries that land outside of the range
    are sent through again until they are inside (cycle walking), which keeps it a bijection and
    needs no memory. On average at most four passes.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(derive_key("round", key, r)) for r in range(ROUNDS)]
    out = _feistel(index.astype(np.uint64), half_bits, round_keys)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _feistel(out[outside], half_bits, round_keys)
    return out.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Blend:
    """Deals global samples to sources by weight.

    After b blocks, source s has had floor(b BLOCK W_s) - floor(b BLOCK W_{s-1}) samples, W_s being
    the sum of the exact shares up to s: within one sample of its share for ever. Inside a block
    the order of the sources is a permutation keyed by (seed, block).
    """

    def __init__(self, weights: Sequence[float], *, seed: int):
        """
        Args:
            weights: any positive numbers; only their proportions count.

        Raises:
            ValueError: if a share is below 1 / BLOCK.
        """
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        for s, weight in enumerate(exact):
            if weight * BLOCK < total:
                raise ValueError(
                    f"source {s}: its share {float(weight / total):.2g} is below 1/{BLOCK}; "
                    "give it more weight, or leave it out"
                )
        self._borders = [sum(exact[:s], Fraction(0)) / total for s in range(len(exact) + 1)]
        self._seed = seed
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def counts(self, num_blocks: int) -> np.ndarray:
        """Samples of every source in the first `num_blocks` blocks."""
        return np.diff([int(num_blocks * BLOCK * border) for border in self._borders])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each global sample, and its running number within that source."""
        source, index = np.empty_like(samples), np.empty_like(samples)
        block_of = samples // BLOCK
        for block in np.unique(block_of):
            here = block_of == block
            block_source, block_index = self._deal(int(block))
            source[here] = block_source[samples[here] % BLOCK]
            index[here] = block_index[samples[here] % BLOCK]
        return source, index

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """`locate` for all samples of one block; the last one is kept, it serves many steps."""
        if self._block is None or self._block[0] != block:
            before, after = self.counts(block), self.counts(block + 1)
            dealt = np.repeat(np.arange(len(before)), after - before)
            source = dealt[
                permute(np.arange(BLOCK), size=BLOCK, key=derive_key("blend", self._seed, block))
            ]
            index = np.empty(BLOCK, dtype=np.int64)
            for s, first in enumerate(before):
                mine = np.flatnonzero(source == s)
                index[mine] = first + np.arange(len(mine))
            self._block = (block, source, index)
        return self._block[1], self._block[2]
