"""Keys that come more than once in a data set, found with 8 bytes of memory a key and never more than a limit.

Keys are compared as 64-bit hashes, sorted; hashes that come more than once are confirmed with the keys themselves.
Where all hashes together would be larger than the limit, they are split by value and the keys are read once a part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

_LARGEST_PART_KEYS = 1 << 27  # 1 GiB of hashes


def repeated(
    samples: list[int], read_keys: Callable[[int], Iterable[str]], part_keys: int = _LARGEST_PART_KEYS
) -> Iterator[tuple[int, int, int]]:
    """Samples whose key an earlier sample has.

    Args:
        samples: number of samples of each shard.
        read_keys: shard number -> its keys, in order; called two or more times a shard.
        part_keys: hashes in memory at a time.

    Yields:
        (shard, row, the shard in which the key comes first).
    """
    parts = max(1, -(-sum(samples) // part_keys))
    for part in range(parts):
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *_hashes(samples, read_keys, part, parts)]))
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        del hashes
        if len(suspects):
            yield from _confirmed(samples, read_keys, suspects)


def _hashes(
    samples: list[int], read_keys: Callable[[int], Iterable[str]], part: int, parts: int
) -> Iterator[npt.NDArray[np.uint64]]:
    for shard in range(len(samples)):
        hashes = _hash(read_keys(shard))
        yield hashes[hashes % np.uint64(parts) == part] if parts > 1 else hashes


def _confirmed(
    samples: list[int], read_keys: Callable[[int], Iterable[str]], suspects: npt.NDArray[np.uint64]
) -> Iterator[tuple[int, int, int]]:
    first: dict[str, int] = {}
    for shard in range(len(samples)):
        keys = list(read_keys(shard))
        for row in np.flatnonzero(np.isin(_hash(keys), suspects)).tolist():
            if keys[row] in first:
                yield shard, row, first[keys[row]]
            else:
                first[keys[row]] = shard


def _hash(keys: Iterable[str]) -> npt.NDArray[np.uint64]:
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), np.uint64)
