"""The order of samples and the seed of each: pure functions, computed per index, no table.

A keyed Feistel network permutes 0 .. 2^bits - 1; indices that fall outside the data set are permuted again until they
fall inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So any part of any epoch
costs what it holds, however large the data set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 12  # halves alternate, so six rounds each
_BLOCK = 4096


@dataclass(frozen=True)
class Plan:
    """Which sample stands where in an endless sequence of epochs, each cut into global batches of `batch_samples`."""

    digest: str  # of the manifest
    num_samples: int
    seed: int
    batch_samples: int
    micro_batch_samples: int
    rank: int
    world_size: int
    train: bool

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one epoch; the last one is filled up with empty slots."""
        return -(-self.num_samples // self.batch_samples)

    def epoch(self, number: int) -> int:
        """Epoch of global batch `number`. Without training every pass is the same: epoch 0."""
        return number // self.batches_per_epoch if self.train else 0

    def ids(self, number: int) -> npt.NDArray[np.int64]:
        """This rank's samples of global batch `number`, micro-batch after micro-batch; -1 = empty slot.

        Rank r's micro-batch m holds the `micro_batch_samples` rows of the global batch from number
        (m * world_size + r) * micro_batch_samples onwards: all ranks together the same rows at any world size.
        """
        start = (number % self.batches_per_epoch) * self.batch_samples
        stop = min(start + self.batch_samples, self.num_samples)
        ids = np.full(self.batch_samples, -1)
        if self.train:
            key = f"{self.digest}/{self.seed}/{self.epoch(number)}".encode()
            ids[: stop - start] = _stretch(start, stop, self.num_samples, key)
        else:
            ids[: stop - start] = np.arange(start, stop)
        return ids.reshape(-1, self.world_size, self.micro_batch_samples)[:, self.rank].ravel()

    def seeds(self, number: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """One number in 0 .. 2^63 - 1 for each of `ids`: all randomness of that sample in that epoch."""
        return sample_seeds(self.seed, self.epoch(number), ids)


def permute(index: npt.NDArray[np.int64], size: int, key: bytes) -> npt.NDArray[np.int64]:
    """Images of `index` [n], each in 0 .. size - 1, under the permutation of 0 .. size - 1 that `key` names."""
    bits = max(1, (size - 1).bit_length())
    rounds = np.frombuffer(hashlib.shake_256(key).digest(8 * _ROUNDS), dtype="<u8")
    out = _feistel(index.astype(np.uint64), bits, rounds)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, rounds)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def sample_seeds(seed: int, epoch: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A hash in 0 .. 2^63 - 1 of (seed, epoch, id) for each of `ids` [n]."""
    start = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    mixed = _mix(ids.astype(np.uint64) + np.frombuffer(start, dtype="<u8"))
    return (mixed >> np.uint64(1)).astype(np.int64)


def _stretch(start: int, stop: int, size: int, key: bytes) -> npt.NDArray[np.int64]:
    """`permute` of start .. stop - 1, block by block: small batches would pay numpy's overhead a hundred times."""
    first = start // _BLOCK
    blocks = [_block(number, size, key) for number in range(first, -(-stop // _BLOCK))]
    return np.concatenate(blocks)[start - first * _BLOCK : stop - first * _BLOCK]


@lru_cache(maxsize=8)
def _block(number: int, size: int, key: bytes) -> npt.NDArray[np.int64]:
    return permute(np.arange(number * _BLOCK, min((number + 1) * _BLOCK, size)), size, key)


def _feistel(value: npt.NDArray[np.uint64], bits: int, rounds: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A permutation of 0 .. 2^bits - 1: each round changes one half by a function of the other."""
    low_bits = np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    low, high = value & low_mask, value >> low_bits
    for number, key in enumerate(rounds):
        if number % 2:
            high = high ^ (_mix(low + key) & high_mask)
        else:
            low = low ^ (_mix(high + key) & low_mask)
    return (high << low_bits) | low


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit. Wraps."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
