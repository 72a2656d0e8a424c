"""Duplicates: what is found is what comparing every row with every other finds, however the records are split."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_scale.curation import dedupe


def in_row_order(hashes: list[int], rows: list[int], near_bits: int) -> list[tuple[int, int]]:
    """The definition, word for word."""
    stays: list[tuple[int, int]] = []
    goes = []
    for row, value in sorted(zip(rows, hashes, strict=True)):
        close = [other for other, kept in stays if (kept ^ value).bit_count() <= near_bits]
        if close:
            goes.append((row, min(close)))
        else:
            stays.append((row, value))
    return goes


@st.composite
def clusters(rng):
    """Hashes around a few centres, at distances about the limit; shuffled row numbers with gaps."""
    centres = rng(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=9)
    members = rng(st.lists(st.tuples(st.sampled_from(centres), flips), max_size=60))
    hashes = []
    for value, places in members:
        for place in places:
            value ^= 1 << place
        hashes.append(value)
    rows = rng(st.lists(st.integers(0, 499), unique=True, min_size=len(hashes), max_size=len(hashes)))
    return hashes, rows


def near(hashes, rows, near_bits, folder, blocks: int = 3) -> list[tuple[int, int]]:
    records = np.empty(len(hashes), dedupe.NEAR)
    records["hash"], records["row"] = np.array(hashes, np.uint64), rows
    found = dedupe.near(np.array_split(records, blocks), len(records), near_bits, 500, folder)
    assert not list(folder.iterdir()), "files were left behind"
    return found.tolist()


@settings(max_examples=60, deadline=None)
@given(clusters(), st.integers(0, 7), st.sampled_from([1 << 21, 5]))
def test_near_is_what_comparing_all_rows_gives(tmp_path_factory, drawn, near_bits, part_records):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "_PART_RECORDS", part_records)
        assert near(*drawn, near_bits, tmp_path_factory.mktemp("near")) == in_row_order(*drawn, near_bits)


@pytest.mark.parametrize("blocks", range(5, 9))
def test_every_pair_is_found_at_any_number_of_blocks(blocks, tmp_path, monkeypatch):
    """The number of blocks depends on how many hashes there are; here each is tried on the same ones."""
    rng = np.random.default_rng(blocks)
    hashes, rows = [], []
    for pair in range(150):  # each pair alone, 4 bits apart at random places
        value = int(rng.integers(0, 2**64, dtype=np.uint64))
        flipped = value
        for place in rng.choice(64, 4, replace=False):
            flipped ^= 1 << int(place)
        hashes += [value, flipped]
        rows += [2 * pair, 2 * pair + 1]
    monkeypatch.setattr(dedupe, "comb", lambda given, _: 0 if given == blocks else 1)  # makes this number cheapest
    assert len(dedupe._Blocks.choose(300, 4).masks) == comb(blocks, 4)
    assert near(hashes, rows, 4, tmp_path) == [(2 * pair + 1, 2 * pair) for pair in range(150)]


def test_chains_do_not_carry_over(tmp_path):
    """0 and 2 are further apart than the limit; 1 is close to both. 1 goes, and 2 is close to nothing that stays."""
    chain = [0b0, 0b1111, 0b11111111]
    assert near(chain, [0, 1, 2], 4, tmp_path) == [(1, 0)]
    assert near(chain, [1, 0, 2], 4, tmp_path) == [(1, 0), (2, 0)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.sampled_from([1 << 21, 4]), st.randoms(use_true_random=False))
def test_exact_keeps_the_lowest_row(tmp_path_factory, contents, part_records, random):
    rows = random.sample(range(100), len(contents))
    records = np.zeros(len(contents), dedupe.EXACT)
    records["sha"][:, 3], records["row"] = contents, rows  # equal in the first words
    first = {value: min(row for row, other in zip(rows, contents, strict=True) if other == value) for value in contents}
    expected = [(row, first[value]) for row, value in sorted(zip(rows, contents, strict=True)) if row != first[value]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedupe, "_PART_RECORDS", part_records)
        blocks = np.array_split(records, 3)
        found = dedupe.exact(blocks, len(records), tmp_path_factory.mktemp("exact"))
    assert found.tolist() == expected
