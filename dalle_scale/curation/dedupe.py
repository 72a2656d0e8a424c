"""Duplicates: rows with the bytes of an earlier one, or nearly its image. Bounded memory, same answer every time.

Exact: of the rows with the same sha256, the one with the lowest number stays.
Near: rows are judged in the order of their numbers; a row goes if a row that stays, with a lower number, has a
perceptual hash that differs in at most `near_bits` of 64 bits. So two rows that stay are never that close, and each
row that goes is close to one that stays (not merely to another one that goes).

Records lie in files, split by a hash of what is looked for into parts that fit into memory. To find all pairs within k
bits, the hash is cut into m > k blocks: two hashes that differ in k bits agree in at least m - k whole blocks, so each
choice of m - k blocks is looked up once. m = k + 1 means fewest passes, a larger m fewer comparisons; the number of
hashes decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_scale import log

Records = npt.NDArray[Any]  # of one of the types below
IntArray = npt.NDArray[np.int64]

EXACT = np.dtype([("sha", "<u8", (4,)), ("row", "<i8")])  # a row and the sha256 of its image's file
NEAR = np.dtype([("hash", "<u8"), ("row", "<i8")])  # a row and its perceptual hash
PAIR = np.dtype([("row", "<i8"), ("of", "<i8")])  # a row and an earlier one
_PART_RECORDS = 1 << 21  # in memory at once, about
_MAX_PARTS = 256  # files open at once
_BLOCK_RECORDS = 1 << 18  # read at once
_SORT_COST, _COMPARE_COST = 100.0, 10.0  # nanoseconds a record and a pair, about


def exact(records: Iterable[Records], count: int, folder: Path) -> Records:
    """The rows that repeat the bytes of an earlier one.

    Args:
        records: EXACT, in blocks.
        count: how many there are, about.
        folder: an empty folder for files that are removed again.

    Returns:
        PAIR [n]: each such row with the lowest row of the same bytes, sorted by row.
    """
    found = []
    for part in _parts(records, lambda block: block["sha"][:, 0], count, folder / "exact"):
        order = np.lexsort((part["row"], *part["sha"].T))
        part = part[order]
        fresh = np.ones(len(part), bool)
        fresh[1:] = (part["sha"][1:] != part["sha"][:-1]).any(axis=1)
        found.append(_later(part["row"], fresh))
    return _sorted(found)


def near(records: Iterable[Records], count: int, near_bits: int, num_rows: int, folder: Path) -> Records:
    """The rows whose image is nearly that of an earlier one; the module says what that means.

    Args:
        records: NEAR, in blocks.
        count: how many there are, about.
        num_rows: all rows are below this.
        folder: an empty folder for files that are removed again.

    Returns:
        PAIR [n]: each such row with the lowest row that stays and is within `near_bits`, sorted by row.
    """
    unique, same = folder / "unique", []
    with unique.open("wb") as file:
        for part in _parts(records, lambda block: block["hash"], count, folder / "hashes"):
            part = part[np.lexsort((part["row"], part["hash"]))]
            fresh = np.ones(len(part), bool)
            fresh[1:] = part["hash"][1:] != part["hash"][:-1]
            same.append(_later(part["row"], fresh))
            part[fresh].tofile(file)
    repeats = _sorted(same)
    distinct = unique.stat().st_size // NEAR.itemsize
    pairs = folder / "pairs"
    with pairs.open("wb") as file:
        for found in _pairs(unique, distinct, near_bits, folder / "blocks"):
            found.tofile(file)
    gone = _judge(pairs, num_rows, folder / "judged")
    unique.unlink()
    pairs.unlink()
    # a row with the hash of a row that went is close to the same row that stays
    at = np.searchsorted(gone["row"], repeats["of"])
    went = np.zeros(len(repeats), bool)
    if len(gone):
        at = np.minimum(at, len(gone) - 1)
        went = gone["row"][at] == repeats["of"]
        repeats["of"][went] = gone["of"][at[went]]
    return _sorted([gone, repeats])


@dataclass(frozen=True)
class _Blocks:
    """Lookup of hashes: one mask for each choice of blocks; pairs within k bits agree under one of them."""

    masks: tuple[int, ...]

    @staticmethod
    def choose(count: int, near_bits: int) -> _Blocks:
        """The cheapest number of blocks for `count` hashes."""

        def cost(blocks: int) -> float:
            bits = 64 * (blocks - near_bits) / blocks
            return comb(blocks, near_bits) * count * (_SORT_COST + _COMPARE_COST * count / 2 / 2**bits)

        blocks = min(range(near_bits + 1, near_bits + 5), key=cost)
        ends = [64 * block // blocks for block in range(blocks + 1)]
        parts = [(1 << high) - (1 << low) for low, high in pairwise(ends)]
        return _Blocks(tuple(sum(choice) for choice in combinations(parts, blocks - near_bits)))


def _pairs(unique: Path, count: int, near_bits: int, folder: Path) -> Iterator[Records]:
    """All pairs of distinct hashes within `near_bits`, each once: PAIR, in blocks."""
    if not near_bits:
        return
    masks = [np.uint64(mask) for mask in _Blocks.choose(count, near_bits).masks]
    for number, mask in enumerate(log.progress(masks, "compare", "passes", total=len(masks))):

        def key(block: Records, mask: np.uint64 = mask) -> npt.NDArray[np.uint64]:
            return block["hash"] & mask

        for part in _parts(_read(unique, NEAR), key, count, folder):
            for low, high in _close(part, mask, near_bits):
                differ = low["hash"] ^ high["hash"]
                before = np.zeros(len(differ), bool)  # found in an earlier pass
                for earlier in masks[:number]:
                    before |= (differ & earlier) == 0
                found = np.empty(int((~before).sum()), PAIR)
                rows = low["row"][~before], high["row"][~before]
                found["row"], found["of"] = np.maximum(*rows), np.minimum(*rows)
                yield found


def _close(part: Records, mask: np.uint64, near_bits: int) -> Iterator[tuple[Records, Records]]:
    """Pairs of records that agree under the mask and differ in at most `near_bits` bits."""
    keys = part["hash"] & mask
    order = np.argsort(keys, kind="stable")
    part, keys = part[order], keys[order]
    first = np.arange(len(part))
    for distance in range(1, len(part)):
        first = first[first + distance < len(part)]
        first = first[keys[first] == keys[first + distance]]
        if not len(first):
            return
        differ = part["hash"][first] ^ part["hash"][first + distance]
        close = first[np.bitwise_count(differ) <= near_bits]
        if len(close):
            yield part[close], part[close + distance]


def _judge(pairs: Path, num_rows: int, folder: Path) -> Records:
    """Rows to leave out, and the rows that they repeat, decided in the order of the rows. PAIR [n], sorted by row."""
    count = pairs.stat().st_size // PAIR.itemsize
    gone = np.zeros(num_rows, bool)
    found: list[Records] = []
    width = -(-num_rows // _num_parts(count))
    for part in _parts(_read(pairs, PAIR), lambda block: block["row"] // width, count, folder, mix=False):
        part = part[np.lexsort((part["of"], part["row"]))]
        kept: list[tuple[int, int]] = []
        for row, of in zip(part["row"].tolist(), part["of"].tolist(), strict=True):
            if not gone[row] and not gone[of]:
                gone[row] = True
                kept.append((row, of))
        found.append(np.array(kept, PAIR))
    return _sorted(found)


# --- records in files -------------------------------------------------------------------------------------------------


def _parts(
    blocks: Iterable[Records],
    key: Callable[[Records], npt.NDArray[Any]],
    count: int,
    folder: Path,
    mix: bool = True,
) -> Iterator[Records]:
    """The records in parts that fit into memory; all with the same key are in the same part.

    mix: spread the keys; else they are the parts' numbers, and the parts come in their order.
    """
    parts = _num_parts(count)
    if parts == 1:
        yield _concatenated(list(blocks))
        return
    folder.mkdir()
    paths = [folder / str(part) for part in range(parts)]
    files = [path.open("wb") for path in paths]
    for block in blocks:
        numbers = key(block)
        if mix:
            numbers = (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        numbers = numbers.astype(np.int64) % parts
        for part in np.unique(numbers):
            block[numbers == part].tofile(files[part])
    for file in files:
        file.close()
    for path in paths:
        yield np.fromfile(path, np.uint8).view(block.dtype)
        path.unlink()
    folder.rmdir()


def _num_parts(count: int) -> int:
    return min(_MAX_PARTS, max(1, -(-count // _PART_RECORDS)))


def _read(path: Path, kind: np.dtype[Any]) -> Iterator[Records]:
    """The records of a file, in blocks; at least one block."""
    with path.open("rb") as file:
        while True:
            block = np.fromfile(file, kind, _BLOCK_RECORDS)
            yield block
            if len(block) < _BLOCK_RECORDS:
                return


def _later(rows: IntArray, fresh: npt.NDArray[np.bool_]) -> Records:
    """In rows sorted into groups, `fresh` where a group starts: every other row with the first of its group."""
    starts = np.maximum.accumulate(np.where(fresh, np.arange(len(rows)), 0))
    found = np.empty(int((~fresh).sum()), PAIR)
    found["row"], found["of"] = rows[~fresh], rows[starts[~fresh]]
    return found


def _concatenated(blocks: list[Records]) -> Records:
    return np.concatenate(blocks) if blocks else np.empty(0, PAIR)


def _sorted(found: list[Records]) -> Records:
    joined = _concatenated(found)
    return joined[np.argsort(joined["row"], kind="stable")]
