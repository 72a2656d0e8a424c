"""The order is a permutation, another one every epoch, and any cut of it gives the same whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_scale.data.order import MIXTURE_SLOTS, Plan, Source, permute, quotas, sample_seeds

SIZES = (10, 1, 30, 0, 25, 35)  # samples of each shard: 101


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


def source(sizes=SIZES, digest: str = "d", window_shards: int = 2) -> Source:
    return Source(digest, np.concatenate([[0], np.cumsum(sizes)]), window_shards)


def plan(world_size: int, rank: int, micro: int, *sources: Source, **changes) -> Plan:
    values = {"seed": 3, "global_batch_size": 24, "train": True} | changes
    values.setdefault("weights", (1.0,) * max(1, len(sources)))
    return Plan(sources or (source(),), micro_batch_size=micro, rank=rank, world_size=world_size, **values)


def epoch_of(one: Plan, number: int = 0) -> np.ndarray:
    """The samples of one epoch in their order."""
    batches = range(number * one.batches_per_epoch, (number + 1) * one.batches_per_epoch)
    ids = np.concatenate([one.slots(batch).sample for batch in batches])
    assert np.all(ids[one.num_samples :] == -1), "empty slots stand at the end"
    return ids[: one.num_samples]


def test_an_epoch_holds_every_sample_once_at_any_world_size():
    reference = None
    for world_size, micro in [(1, 24), (1, 8), (2, 12), (2, 4), (3, 8), (3, 2), (4, 6), (8, 3), (12, 1)]:
        plans = [plan(world_size, rank, micro) for rank in range(world_size)]
        batches = []
        for number in range(2 * plans[0].batches_per_epoch):
            parts = [p.slots(number).sample.reshape(-1, micro) for p in plans]
            batches.append(np.concatenate([part for step in zip(*parts, strict=True) for part in step]))
        epochs = [np.concatenate(batches[:5]), np.concatenate(batches[5:])]
        for epoch in epochs:
            assert np.array_equal(np.sort(epoch[epoch >= 0]), np.arange(101))
            assert np.all(epoch[101:] == -1), "empty slots stand at the end"
        assert not np.array_equal(*epochs)
        reference = batches if reference is None else reference
        assert all(np.array_equal(a, b) for a, b in zip(batches, reference, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    window_shards=st.integers(1, 14),
    batch=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_every_window_is_shuffled_within_itself(sizes, window_shards, batch, seed):
    one = source(sizes, window_shards=window_shards)
    ids = epoch_of(plan(1, 0, batch, one, global_batch_size=batch, seed=seed))
    assert np.array_equal(np.sort(ids), np.arange(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    place, windows = 0, -(-len(sizes) // window_shards)
    for window in range(windows):
        shards = one.shards_of_window(seed, 0, window)
        stop = place + sum(sizes[shard] for shard in shards)
        assert set(shard_of[ids[place:stop]].tolist()) == {shard for shard in shards if sizes[shard]}
        place = stop
    assert place == len(ids)


def test_shards_change_their_turn_and_mix_inside_a_window():
    one = source((100,) * 12, window_shards=3)
    ids = epoch_of(plan(1, 0, 24, one))
    nets_to_update = [sorted(one.shards_of_window(3, epoch, 0)) for epoch in range(20)]
    assert len({tuple(turn) for turn in nets_to_update}) > 10
    shards = ids[:300] // 100
    assert 0.2 < np.mean(shards[1:] == shards[:-1]) < 0.46, "a third, if three shards are mixed"


def test_order_across_blocks_and_batches_is_one_permutation():
    one = source((4_000, 5_000, 1_000), window_shards=8)
    ids = epoch_of(plan(1, 0, 1000, one, global_batch_size=1000))
    assert np.array_equal(np.sort(ids), np.arange(10_000))
    assert np.array_equal(epoch_of(plan(1, 0, 8, one, global_batch_size=8)), ids)


def test_order_depends_on_digest_and_seed():
    orders = {
        plan(1, 0, 24, source(digest=digest), seed=seed).slots(0).sample.tobytes()
        for digest, seed in itertools.product("ab", range(2))
    }
    assert len(orders) == 4


def test_without_training_every_pass_of_every_run_is_the_same():
    valid = plan(1, 0, 24, train=False)
    first = epoch_of(valid)
    assert np.array_equal(np.sort(first), np.arange(101)) and not np.array_equal(first, np.arange(101))
    assert np.array_equal(valid.slots(6).sample, valid.slots(1).sample)
    assert np.array_equal(epoch_of(plan(1, 0, 24, train=False, seed=9)), first)
    assert valid.epoch(6) == 0


def test_seeds_differ_by_run_epoch_and_sample():
    ids = np.arange(10_000)
    streams = [sample_seeds(seed, epoch, ids, stream) for seed in (0, 1) for epoch in (0, 1) for stream in (0, 1)]
    together = np.concatenate(streams)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    ones = np.unpackbits(together.view(np.uint8)).mean() * 64 / 63
    assert abs(ones - 0.5) < 0.005
    assert np.array_equal(sample_seeds(1, 1, ids[77:78]), streams[6][77:78])


@settings(deadline=None, max_examples=50)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9).map(tuple))
def test_quotas_are_the_shares_to_one_slot(weights):
    counts = np.array(quotas(weights))
    exact = np.array(weights) / sum(weights) * MIXTURE_SLOTS
    assert counts.sum() == MIXTURE_SLOTS and np.all(np.abs(counts - exact) < 1)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 24), (2, 4), (3, 8), (8, 3)])
def test_a_mixture_goes_through_each_data_set_in_its_own_order(world_size, micro):
    sources = (source((50, 51), "a"), source((700,), "b"), source((7,), "c"))
    plans = [plan(world_size, rank, micro, *sources, weights=(3, 1, 0.5)) for rank in range(world_size)]
    batches = 3 * MIXTURE_SLOTS // 24 + 5
    seen: list[list[tuple[int, int]]] = [[], [], []]
    places = np.zeros(3, np.int64)
    for number in range(batches):
        parts = [p.slots(number) for p in plans]
        rows = [np.arange(24).reshape(-1, world_size, micro)[:, rank].ravel() for rank in range(world_size)]
        merged = sorted(
            (row, *values)
            for part, own in zip(parts, rows, strict=True)
            for row, values in zip(own, zip(part.source, part.sample, part.epoch, strict=True), strict=True)
        )
        for row, owner, sample, epoch in merged:
            seen[owner].append((int(epoch), int(sample)))
            if number * 24 + row < 3 * MIXTURE_SLOTS:
                places[owner] += 1
    assert np.array_equal(places, 3 * np.array(quotas((3, 1, 0.5))))
    for one, pairs in zip(sources, seen, strict=True):
        for epoch in range(pairs[-1][0]):
            samples = [sample for number, sample in pairs if number == epoch]
            assert samples == one.ids(3, epoch, 0, one.num_samples).tolist(), "whole epochs, in the order of the set"


def test_mixture_draws_no_pattern_and_belongs_to_weights_and_parts():
    sources = (source((5000,), "a"), source((5000,), "b"))
    one = plan(1, 0, 1024, *sources, global_batch_size=1024)
    owners = np.concatenate([one.slots(number).source for number in range(8)])
    assert 0.45 < np.mean(owners[1:] == owners[:-1]) < 0.55
    other = plan(1, 0, 1024, *sources, global_batch_size=1024, weights=(1, 2))
    assert len({one.digest, other.digest, plan(1, 0, 24, sources[0]).digest}) == 3
    seeds = one.seeds(one.slots(0))
    assert len(np.unique(seeds)) == 1024, "the same number in two data sets has two seeds"


def test_windows_near_are_those_that_are_read_next():
    one = plan(1, 0, 24, source((10,) * 12, window_shards=3))  # 120 samples, five batches an epoch
    for number in range(12):
        shards = {
            shard
            for _, epoch, window in one.windows_near(number)
            for shard in one.sources[0].shards_of_window(3, epoch, window)
        }
        needed = {sample // 10 for batch in (number, number + 1) for sample in one.slots(batch).sample.tolist()}
        assert needed <= shards and len(one.windows_near(number)) <= 4
