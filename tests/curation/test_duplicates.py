"""Keys that come twice are found whatever the limit on memory, and hashes that collide are not taken for keys."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_scale.curation import duplicate_keys
from dalle_scale.curation.duplicate_keys import repeated

key_lists = st.lists(st.lists(st.sampled_from([f"k{number}" for number in range(30)] + ["ä/ö", ""]), max_size=8))


def expected(shards: list[list[str]]) -> set[tuple[int, int, int]]:
    first: dict[str, int] = {}
    found = set()
    for shard, keys in enumerate(shards):
        for row, key in enumerate(keys):
            if first.setdefault(key, shard) != shard or key in keys[:row]:
                found.add((shard, row, first[key]))
    return found


@given(key_lists, st.integers(1, 50))
def test_against_a_dictionary(shards, part_keys):
    found = list(repeated([len(keys) for keys in shards], shards.__getitem__, part_keys))
    assert len(found) == len(set(found)) and set(found) == expected(shards)


@pytest.mark.parametrize("modulus", [1, 3])
def test_colliding_hashes(monkeypatch, modulus):
    monkeypatch.setattr(
        duplicate_keys, "_hash", lambda keys: np.array([sum(key.encode()) % modulus for key in keys], np.uint64)
    )
    shards = [["a", "b"], ["c", "a"], ["d"]]
    assert list(repeated([2, 2, 1], shards.__getitem__)) == [(1, 1, 0)]
