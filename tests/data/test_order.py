"""The order is a permutation, another one every epoch, and any cut of it gives the same whole."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_scale.data.order import Plan, permute, sample_seeds


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), key=st.binary(max_size=16))
def test_permute_is_a_bijection(size, key):
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 1 << 48), key=st.binary(max_size=16), data=st.data())
def test_permute_of_one_index_is_that_of_the_whole(size, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    image = permute(index, size, key)
    assert image.min() >= 0 and image.max() < size and len(set(image.tolist())) == len(index)
    assert permute(index[-1:], size, key)[0] == image[-1]


def test_every_sample_reaches_every_place_equally_often():
    size, keys = 5, 2000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(np.arange(size), size, str(key).encode())] += 1
    chi2 = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert chi2 < 16 + 5 * np.sqrt(2 * 16), "16 degrees of freedom, five standard deviations"


def test_neighbours_do_not_stay_neighbours():
    size = 10_000
    image = permute(np.arange(size), size, b"key")
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(image)) < 10) < 0.01  # 0.2 % for a random permutation


def plan(world_size: int, rank: int, micro: int, **changes) -> Plan:
    values = {"digest": "d", "num_samples": 101, "seed": 3, "batch_samples": 24, "train": True} | changes
    return Plan(micro_batch_samples=micro, rank=rank, world_size=world_size, **values)


def test_an_epoch_holds_every_sample_once_at_any_world_size():
    reference = None
    for world_size, micro in [(1, 24), (1, 8), (2, 12), (2, 4), (3, 8), (3, 2), (4, 6), (8, 3), (12, 1)]:
        plans = [plan(world_size, rank, micro) for rank in range(world_size)]
        batches = []
        for number in range(2 * plans[0].batches_per_epoch):
            parts = [p.ids(number).reshape(-1, micro) for p in plans]
            batches.append(np.concatenate([part for step in zip(*parts, strict=True) for part in step]))
        epochs = [np.concatenate(batches[:5]), np.concatenate(batches[5:])]
        for epoch in epochs:
            assert np.array_equal(np.sort(epoch[epoch >= 0]), np.arange(101))
            assert np.all(epoch[101:] == -1), "empty slots stand at the end"
        assert not np.array_equal(*epochs)
        reference = batches if reference is None else reference
        assert all(np.array_equal(a, b) for a, b in zip(batches, reference, strict=True))


def test_order_across_blocks_and_batches_is_one_permutation():
    big = plan(1, 0, 1000, num_samples=10_000, batch_samples=1000)
    ids = np.concatenate([big.ids(number) for number in range(big.batches_per_epoch)])
    assert np.array_equal(np.sort(ids), np.arange(10_000))
    small = plan(1, 0, 8, num_samples=10_000, batch_samples=8)
    assert np.array_equal(np.concatenate([small.ids(number) for number in range(1250)]), ids)


def test_order_depends_on_digest_and_seed():
    orders = {
        plan(1, 0, 24, digest=digest, seed=seed).ids(0).tobytes() for digest, seed in itertools.product("ab", range(2))
    }
    assert len(orders) == 4


def test_without_training_samples_come_in_storage_order_every_time():
    valid = plan(1, 0, 24, train=False)
    assert np.array_equal(valid.ids(1), np.arange(24, 48))
    assert np.array_equal(valid.ids(4), np.r_[np.arange(96, 101), np.full(19, -1)])
    assert np.array_equal(valid.ids(6), valid.ids(1))
    assert valid.epoch(6) == 0


def test_seeds_differ_by_run_epoch_and_sample():
    ids = np.arange(10_000)
    streams = [sample_seeds(seed, epoch, ids) for seed in (0, 1) for epoch in (0, 1)]
    together = np.concatenate(streams)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    ones = np.unpackbits(together.view(np.uint8)).mean() * 64 / 63
    assert abs(ones - 0.5) < 0.005
    assert np.array_equal(sample_seeds(1, 1, ids[77:78]), streams[3][77:78])
