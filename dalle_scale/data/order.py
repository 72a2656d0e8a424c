"""The order of samples and the seed of each: pure functions, computed per index, no table of samples.

A keyed Feistel network permutes 0 .. 2^bits - 1; indices that fall outside the data set are permuted again until they
fall inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So any part of any epoch
costs what it holds, however large the data set.

An epoch permutes the shards, cuts them into windows of `window_shards`, and permutes the samples of each window: near
a place in the epoch only one window's shards are read, which is what a cache of remote shards needs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_ROUNDS = 12  # halves alternate, so six rounds each
_BLOCK = 4096
MIXTURE_SLOTS = 4096  # after so many samples every data set of a mixture has had exactly its share


@dataclass(frozen=True, eq=False)
class Source:
    """One data set as the order sees it."""

    digest: str  # of the manifest
    starts: IntArray  # [S + 1]: samples in the shards before each shard
    window_shards: int

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.starts[-1])

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.starts) - 1

    def ids(self, seed: int, epoch: int, start: int, stop: int) -> IntArray:
        """The samples at the places `start` .. `stop` - 1 of an epoch, each in 0 .. N - 1."""
        order = _epoch_order(self, seed, epoch)
        parts = [np.empty(0, np.int64)]
        window = int(np.searchsorted(order.window_starts, start, side="right")) - 1
        while start < stop:
            first, last = order.window_starts[window : window + 2].tolist()
            if first < last:
                key = f"{self.digest}/{seed}/{epoch}/{window}".encode()
                local = _stretch(start - first, min(stop, last) - first, last - first, key)
                place = np.searchsorted(order.ends, first + local, side="right")  # of the shard, in the epoch
                parts.append(order.firsts[place] + (first + local - order.begins[place]))
                start = min(stop, last)
            window += 1
        return np.concatenate(parts)

    def windows_of(self, seed: int, epoch: int, samples: IntArray) -> list[tuple[int, int]]:
        """(epoch, window) of the windows that these samples lie in, and of the one after each."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        windows = np.unique(np.argsort(_epoch_order(self, seed, epoch).shards)[shards] // self.window_shards)
        last = (self.num_shards - 1) // self.window_shards
        after = [(epoch, window + 1) if window < last else (epoch + 1, 0) for window in windows.tolist()]
        return [*((epoch, window) for window in windows.tolist()), *after]

    def shards_of_window(self, seed: int, epoch: int, window: int) -> list[int]:
        """The shards that the samples of one window lie in."""
        places = slice(window * self.window_shards, (window + 1) * self.window_shards)
        shards: list[int] = _epoch_order(self, seed, epoch).shards[places].tolist()
        return shards


@dataclass(frozen=True, eq=False)
class _EpochOrder:
    """The shards of one epoch in their turn."""

    shards: IntArray  # [S]
    firsts: IntArray  # [S], number of the first sample of each
    begins: IntArray  # [S], place of it in the epoch's shards laid end to end
    ends: IntArray  # [S]
    window_starts: IntArray  # [W + 1], the same for windows


@lru_cache(maxsize=16)
def _epoch_order(source: Source, seed: int, epoch: int) -> _EpochOrder:
    count = source.num_shards
    shards = permute(np.arange(count), count, f"{source.digest}/{seed}/{epoch}/shards".encode())
    sizes = np.diff(source.starts)[shards]
    ends = np.cumsum(sizes)
    begins = ends - sizes
    window_starts = np.append(begins[:: source.window_shards], source.num_samples)
    return _EpochOrder(shards, source.starts[shards], begins, ends, window_starts)


@dataclass(frozen=True)
class Slots:
    """Samples in n slots of a global batch."""

    source: IntArray  # [n], which data set; 0 in an empty slot
    sample: IntArray  # [n], number in that data set, -1 = empty slot
    epoch: IntArray  # [n], how often that data set has been through

    def __getitem__(self, rows: npt.NDArray[np.intp]) -> Slots:
        return Slots(self.source[rows], self.sample[rows], self.epoch[rows])


@dataclass(frozen=True, eq=False)
class Plan:
    """Order of samples in an endless sequence of global batches of `global_batch_size`.

    One data set: epochs follow each other; the last batch of each is filled up with empty slots. Several (a mixture):
    every stretch of MIXTURE_SLOTS places holds each data set by exactly its share, in an order of its own, and each
    data set goes through its own epochs; no slot is empty.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]  # one a source
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    train: bool

    @property
    def digest(self) -> str:
        """Of what is read: the manifest's, for a mixture a hash of all and their shares."""
        if len(self.sources) == 1:
            return self.sources[0].digest
        parts = [f"{source.digest} {quota}" for source, quota in zip(self.sources, self._quotas, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def _seed(self) -> int:
        return self.seed if self.train else 0

    @property
    def num_samples(self) -> int:
        """Samples of all data sets."""
        return sum(source.num_samples for source in self.sources)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches that hold as many samples as there are."""
        return -(-self.num_samples // self.global_batch_size)

    def epoch(self, number: int) -> int:
        """Epoch of global batch `number`. Without training every pass of every run is the same: epoch 0 of seed 0."""
        return number // self.batches_per_epoch if self.train else 0

    def slots(self, number: int) -> Slots:
        """This rank's slots of global batch `number`, micro-batch after micro-batch.

        Rank r's micro-batch m holds the `micro_batch_size` rows of the global batch from number
        (m * world_size + r) * micro_batch_size onwards: all ranks together the same rows at any world size.
        """
        rows = np.arange(self.global_batch_size).reshape(-1, self.world_size, self.micro_batch_size)
        return self.global_slots(number)[rows[:, self.rank].ravel()]

    def global_slots(self, number: int) -> Slots:
        """All slots of global batch `number`."""
        if len(self.sources) > 1:
            return self._mixed(number * self.global_batch_size, (number + 1) * self.global_batch_size)
        source, epoch = self.sources[0], self.epoch(number)
        start = (number % self.batches_per_epoch) * self.global_batch_size
        stop = min(start + self.global_batch_size, source.num_samples)
        sample = np.full(self.global_batch_size, -1)
        # held-out samples too: their first few hundred must not all be of one class where a set is sorted by class
        sample[: stop - start] = source.ids(self._seed, epoch, start, stop)
        return Slots(np.zeros_like(sample), sample, np.full_like(sample, epoch))

    def windows_near(self, number: int) -> set[tuple[int, int, int]]:
        """(source, epoch, window) of the windows that global batch `number` and those soon after it read from."""
        slots = self.global_slots(number)
        near = set()
        for source, epoch in _pairs(slots):
            samples = slots.sample[(slots.source == source) & (slots.epoch == epoch) & (slots.sample >= 0)]
            near |= {(source, *window) for window in self.sources[source].windows_of(self.seed, epoch, samples)}
        return near

    def seeds(self, slots: Slots) -> IntArray:
        """One number in 0 .. 2^63 - 1 for each slot: all randomness of that sample in that epoch."""
        out = np.empty_like(slots.sample)
        for source, epoch in _pairs(slots):
            rows = (slots.source == source) & (slots.epoch == epoch)
            out[rows] = sample_seeds(self._seed, epoch, slots.sample[rows], stream=source)
        return out

    def _mixed(self, start: int, stop: int) -> Slots:
        """Slots of a mixture at the places start .. stop - 1 of the whole sequence."""
        places = np.arange(start, stop)
        source, nth = np.empty_like(places), np.empty_like(places)
        quotas = np.array(self._quotas)
        for stretch in range(start // MIXTURE_SLOTS, -(-stop // MIXTURE_SLOTS)):
            rows = places // MIXTURE_SLOTS == stretch
            inside = places[rows] % MIXTURE_SLOTS
            sources, ordinals = _mixture_stretch(f"{self.digest}/{self.seed}/{stretch}".encode(), self._quotas)
            source[rows] = sources[inside]
            nth[rows] = stretch * quotas[sources[inside]] + ordinals[inside]
        sample, epoch = np.empty_like(places), np.empty_like(places)
        for number, one in enumerate(self.sources):
            rows = np.flatnonzero(source == number)
            epoch[rows] = nth[rows] // one.num_samples
            for turn in np.unique(epoch[rows]).tolist():
                own = rows[epoch[rows] == turn]  # consecutive places of that epoch, in order
                first = int(nth[own[0]]) % one.num_samples
                sample[own] = one.ids(self.seed, turn, first, first + len(own))
        return Slots(source, sample, epoch)

    @property
    def _quotas(self) -> tuple[int, ...]:
        """Places of each data set among MIXTURE_SLOTS."""
        return quotas(self.weights)


def _pairs(slots: Slots) -> set[tuple[int, int]]:
    """Every (source, epoch) that occurs."""
    return set(zip(slots.source.tolist(), slots.epoch.tolist(), strict=True))


def quotas(weights: tuple[float, ...]) -> tuple[int, ...]:
    """MIXTURE_SLOTS cut by weight: whole numbers by the largest remainders, in order where they are equal."""
    exact = [weight * MIXTURE_SLOTS / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: MIXTURE_SLOTS - sum(counts)]:
        counts[number] += 1
    return tuple(counts)


@lru_cache(maxsize=8)
def _mixture_stretch(key: bytes, shares: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """For each of MIXTURE_SLOTS places: whose it is, and how many of the same data set come before it."""
    permuted = permute(np.arange(MIXTURE_SLOTS), MIXTURE_SLOTS, key)
    sources = np.searchsorted(np.cumsum(shares), permuted, side="right").astype(np.int64)
    ordinals = np.empty(MIXTURE_SLOTS, np.int64)
    for number in range(len(shares)):
        rows = sources == number
        ordinals[rows] = np.arange(int(rows.sum()))
    return sources, ordinals


def permute(index: IntArray, size: int, key: bytes) -> IntArray:
    """Images of `index` [n], each in 0 .. size - 1, under the permutation of 0 .. size - 1 that `key` names."""
    bits = max(1, (size - 1).bit_length())
    rounds = np.frombuffer(hashlib.shake_256(key).digest(8 * _ROUNDS), dtype="<u8")
    out = _feistel(index.astype(np.uint64), bits, rounds)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _feistel(out[outside], bits, rounds)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def sample_seeds(seed: int, epoch: int, ids: IntArray, stream: int = 0) -> IntArray:
    """A hash in 0 .. 2^63 - 1 of (seed, epoch, stream, id) for each of `ids` [n]."""
    text = f"{seed}/{epoch}/{stream}" if stream else f"{seed}/{epoch}"
    start = hashlib.blake2b(text.encode(), digest_size=8).digest()
    mixed = _mix(ids.astype(np.uint64) + np.frombuffer(start, dtype="<u8"))
    return (mixed >> np.uint64(1)).astype(np.int64)


def _stretch(start: int, stop: int, size: int, key: bytes) -> IntArray:
    """`permute` of start .. stop - 1, block by block: small batches would pay numpy's overhead a hundred times."""
    first = start // _BLOCK
    blocks = [_block(number, size, key) for number in range(first, -(-stop // _BLOCK))]
    return np.concatenate(blocks)[start - first * _BLOCK : stop - first * _BLOCK]


@lru_cache(maxsize=16)
def _block(number: int, size: int, key: bytes) -> IntArray:
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
