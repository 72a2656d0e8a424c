"""Uniform and normal noise: distribution, independence, and that a sample's noise is its own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_scale.nn import counter_rng
from dalle_scale.nn.counter_rng import normal_noise, uniform_noise
from dalle_scale.nn.gumbel import gumbel_noise

MASK = (1 << 32) - 1


def lowbias32(x: int) -> int:
    """The hash in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def uniform_by_definition(seed: int, step: int, position: int) -> float:
    """One number, from the definition, with arithmetic shifts of signed 64-bit integers written out."""
    golden, mix = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
    key = (seed + step * golden) * mix % (1 << 64)
    sign = ((1 << 31) - 1) << 33 if key >> 63 else 0
    key = (key ^ (key >> 31 | sign)) * golden % (1 << 64)
    bits = lowbias32(lowbias32(position) ^ lowbias32(key >> 32))
    return ((bits >> 9) + 0.5) / 2**23


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62 + 11, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("step", [0, 7, 10**6])
def test_uniform_noise_is_the_hash(seed: int, step: int) -> None:
    expected = [uniform_by_definition(seed, step, position) for position in range(20)]
    assert uniform_noise(torch.tensor([seed]), step, 20)[0].tolist() == expected


def distance_to(cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance of values whose distribution function, sorted, is `cdf` [n], times sqrt(n)."""
    n = len(cdf)
    return float((cdf - (torch.arange(n) + 0.5) / n).abs().max()) * math.sqrt(n)


def test_uniform_noise_is_uniform_on_the_open_interval() -> None:
    noise = uniform_noise(torch.arange(8), 3, 100_000).flatten()
    assert float(noise.min()) > 0 and float(noise.max()) < 1
    assert distance_to(noise.double().sort().values) < 1.95  # p = 0.001
    counts = torch.bincount((noise * 256).long(), minlength=256).double()
    mean = len(noise) / 256
    assert 255 - 4 * math.sqrt(510) < float((counts - mean).square().sum() / mean) < 255 + 4 * math.sqrt(510)


def test_normal_noise_is_standard_normal() -> None:
    noise = normal_noise(torch.arange(8), 3, 100_000).flatten().double()
    n = len(noise)
    assert distance_to(0.5 * (1 + torch.erf(noise.sort().values / math.sqrt(2)))) < 1.95
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert float((noise**power).mean()) == pytest.approx(moment, abs=4 * math.sqrt(variance / n))
    assert float((noise.abs() > 4).double().mean()) == pytest.approx(6.33e-5, abs=4 * math.sqrt(6.33e-5 / n))


def test_normal_noise_is_the_inverse_distribution_function_at_the_uniform_noise() -> None:
    seeds = torch.tensor([1, -3])
    expected = torch.special.ndtri(uniform_noise(seeds, 5, 50_000).double())
    torch.testing.assert_close(normal_noise(seeds, 5, 50_000).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("noise", [uniform_noise, normal_noise, gumbel_noise])
def test_noise_is_bit_equal_whatever_is_drawn_beside_it(noise) -> None:  # type: ignore[no-untyped-def]
    seeds = torch.tensor([5, -7, 2**62 + 11, 0, 5])
    together = noise(seeds, 9, 1001)
    assert torch.equal(together[0], together[4])
    for count in (1, 2, 7, 8, 9, 31, 64, 1001):  # kernels take 8 or 16 numbers at a time and the rest one by one
        for row, seed in zip(together, seeds, strict=True):
            assert torch.equal(noise(seed[None], 9, count)[0], row[:count])
        assert torch.equal(noise(seeds.flip(0), 9, count), together.flip(0)[:, :count])
    assert not torch.equal(noise(seeds, 10, 1001), together)


@pytest.mark.parametrize("seeds, steps", [((0, 1), (0, 0)), ((0, 0), (0, 1)), ((3, 4), (4, 3)), ((0, 2**32), (0, 0))])
def test_normal_noise_of_different_seeds_or_steps_is_independent(
    seeds: tuple[int, int], steps: tuple[int, int]
) -> None:
    n = 40_000
    a, b = (normal_noise(torch.tensor([seed]), step, n)[0] for seed, step in zip(seeds, steps, strict=True))
    for shift in (0, 1, 7):
        shifted = b.roll(shift)
        for first, second in ((a, shifted), (a.square(), shifted.square())):
            assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 4.5 / math.sqrt(n)


def test_normal_noise_has_no_structure_along_positions() -> None:
    noise = normal_noise(torch.tensor([1]), 0, 40_000)[0]
    for lag in (1, 2, 64, 512):
        pair = torch.stack([noise[:-lag], noise[lag:]])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / math.sqrt(len(noise))


@pytest.mark.parametrize("at_once", [1, 7, 100, 1000])
def test_noise_does_not_depend_on_how_much_is_drawn_at_once(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, steps = torch.tensor([5, -7, 2**62 + 11]), torch.tensor([3, 2**40, 0])
    for step in (3, steps):
        monkeypatch.setattr(counter_rng, "_AT_ONCE", 1 << 16)
        whole = counter_rng.uniform_noise(seeds, step, 100)
        monkeypatch.setattr(counter_rng, "_AT_ONCE", at_once)
        assert torch.equal(counter_rng.uniform_noise(seeds, step, 100), whole)
