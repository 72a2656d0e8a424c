"""Bits of pixels: every distribution sums to 1, the table against a loop over pixels, the whole code against Kraft."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from dalle_scale.evaluation.metrics import code_length
from dalle_scale.evaluation.metrics.code_length import FAMILIES, SCALES, cheapest, count_pairs

FAMILY_NAMES = sorted(FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The tables of all families and scales, made once."""
    with pytest.MonkeyPatch.context() as patch:
        for family, nats in FAMILIES.items():
            patch.setitem(code_length.FAMILIES, family, cache(nats))
        yield


def probability(family: str, m: int, x: int, scale: float) -> float:
    """Of byte x around byte m, from Python's own functions."""

    def upper(z: float) -> float:  # probability of all beyond z
        if family == "normal":
            return math.erfc(z / math.sqrt(2)) / 2
        return 1 / (1 + math.exp(min(z, 700)))

    m, x = (m, x) if x >= m else (255 - m, 255 - x)  # the mirror image has digits to subtract
    below = 1.0 if x == 0 else upper((x - 0.5 - m) / scale)
    return below - (0.0 if x == 255 else upper((x + 0.5 - m) / scale))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_distribution_sums_to_one(family):
    for scale in SCALES:
        nats = FAMILIES[family](scale)
        assert nats.shape == (256, 256) and nats.dtype == torch.float64 and nats.isfinite().all() and nats.min() >= 0
        torch.testing.assert_close(torch.exp(-nats).sum(1), torch.ones(256).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(nats, nats.flip(0, 1), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("scale", [SCALES[0], SCALES[25], SCALES[45], SCALES[63]])
def test_probabilities_by_the_formula(family, scale):
    nats = FAMILIES[family](scale)
    seen = 0
    for m in (0, 1, 100, 254, 255):
        for x in (0, 1, 60, 98, 99, 100, 101, 140, 254, 255):
            want = probability(family, m, x, scale)
            if want > 1e-290:
                assert float(nats[m, x]) == pytest.approx(-math.log(want), rel=1e-4, abs=1e-6), (m, x)
                seen += 1
    assert seen >= 12


def test_scales_are_those_that_are_told():
    steps = [later / first for first, later in itertools.pairwise(SCALES)]
    assert (len(SCALES), SCALES[0], SCALES[63]) == (64, 0.125, 64) and sorted(FAMILIES) == ["logistic", "normal"]
    assert max(steps) == pytest.approx(min(steps)) and max(steps) == pytest.approx(1.104, abs=1e-3)


def noisy(spread: float, shape: tuple[int, ...] = (3, 3, 6, 5)) -> tuple[Tensor, Tensor]:
    """Decoded bytes and bytes around them."""
    generator = torch.Generator().manual_seed(1)
    decoded = torch.randint(0, 256, shape, generator=generator)
    images = (decoded + spread * torch.randn(shape, generator=generator)).round().clamp(0, 255)
    return decoded.to(torch.uint8), images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def test_table_is_a_loop_over_pixels():
    decoded, images = noisy(4.0)
    best = math.inf
    for family in FAMILY_NAMES:
        for scale in SCALES[20:50:3]:
            pairs = zip(decoded.flatten().tolist(), images.flatten().tolist(), strict=True)
            shares = [probability(family, m, x, scale) for m, x in pairs]
            direct = sum(-math.log2(share) for share in shares) if min(shares) else math.inf
            nats = (count_pairs(decoded, images) * FAMILIES[family](scale)).sum()
            if direct < 1e6:
                assert float(nats) / math.log(2) == pytest.approx(direct, rel=1e-5)
                best = min(best, direct)
    got = cheapest(count_pairs(decoded, images))
    assert best * 0.99 < got.bits - 7 <= best * (1 + 1e-5), "the loop tries only some scales"


def test_pairs_are_counted():
    decoded, images = noisy(30.0)
    pairs = count_pairs(decoded, images)
    want = torch.zeros(256, 256, dtype=torch.int64)
    for m, x in zip(decoded.flatten().tolist(), images.flatten().tolist(), strict=True):
        want[m, x] += 1
    assert torch.equal(pairs, want)
    parts = [count_pairs(decoded[part], images[part]) for part in (slice(0, 1), slice(1, 1), slice(1, 3))]
    assert torch.equal(sum(parts), pairs)


def test_the_whole_code_is_one_that_can_be_read_back():
    """Kraft: over all that could be there, here one byte, 2^-bits sums to no more than 1. The best scale without its
    name would not be a code."""
    bits = []
    for x in range(256):
        pairs = torch.zeros(256, 256, dtype=torch.int64)
        pairs[100, x] = 1
        bits.append(cheapest(pairs).bits)
    assert sum(2**-value for value in bits) <= 1
    assert sum(2 ** -(value - 7) for value in bits) > 2


@pytest.mark.parametrize("spread", [0.8, 5.0, 30.0])
def test_the_grid_of_scales_costs_little(spread):
    generator = torch.Generator().manual_seed(2)
    decoded = torch.full((200_000,), 128)
    images = (decoded + spread * torch.randn(200_000, generator=generator)).round().clamp(0, 255)
    pairs = count_pairs(decoded.to(torch.uint8), images.to(torch.uint8))
    got = cheapest(pairs)
    assert got.family == "normal" and got.scale == pytest.approx(spread, rel=0.11)
    finer = [got.scale * 1.004**step for step in range(-30, 31)]
    best = min(float((pairs * code_length.gaussian_nats(scale)).sum()) for scale in finer) / math.log(2)
    assert 0 <= (got.bits - 7 - best) / 200_000 < 0.004


def test_long_tails_take_the_other_family():
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(100_000, generator=generator)
    images = (128 + 6 * torch.logit(uniform)).round().clamp(0, 255).to(torch.uint8)
    got = cheapest(count_pairs(torch.full_like(images, 128), images))
    assert got.family == "logistic" and got.scale == pytest.approx(6, rel=0.11) and str(got).startswith("logistic ")


def test_images_that_come_back_exactly_cost_all_but_nothing():
    decoded, _ = noisy(0.0)
    got = cheapest(count_pairs(decoded, decoded))
    assert got.scale == SCALES[0] and 7 < got.bits < 7 + 2e-4 * decoded.numel()
