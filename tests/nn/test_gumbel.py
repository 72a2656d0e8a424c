"""Noise, relaxation and KL against closed forms and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical
from torch.nn import functional as F

from dalle_scale.nn import gumbel
from dalle_scale.nn.gumbel import gumbel_noise, gumbel_softmax, gumbel_steps, kl_to_uniform


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.arange(8), step=3, count=50_000).flatten()
    n = len(noise)
    cdf = torch.exp(-torch.exp(-noise.double().sort().values))
    empirical = (torch.arange(n) + 0.5) / n
    assert float((cdf - empirical).abs().max()) < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all()


def test_noise_of_a_sample_depends_on_its_seed_and_the_step_only() -> None:
    seeds = torch.tensor([5, -7, 2**62 + 11, 0])
    together = gumbel_noise(seeds, step=9, count=300)
    for row, seed in zip(together, seeds, strict=True):
        assert torch.equal(gumbel_noise(seed[None], step=9, count=300)[0], row)
    assert torch.equal(gumbel_noise(seeds.flip(0), step=9, count=300), together.flip(0))
    assert not torch.equal(gumbel_noise(seeds, step=10, count=300), together)


@pytest.mark.parametrize("samples, steps", [(1, range(3, 40)), (3, range(5)), (20, range(7, 9)), (2, range(4, 4))])
def test_noise_of_steps_is_that_of_each(samples: int, steps: range) -> None:
    seeds = torch.arange(samples) * 2**40 - 5
    rows = list(gumbel_steps(seeds, steps, 50))
    assert len(rows) == len(steps)
    for step, row in zip(steps, rows, strict=True):
        assert torch.equal(row, gumbel_noise(seeds, step, 50))


@pytest.mark.parametrize("seeds, steps", [((0, 1), (0, 0)), ((0, 0), (0, 1)), ((3, 4), (4, 3)), ((0, 2**32), (0, 0))])
def test_noise_of_different_seeds_or_steps_is_uncorrelated(seeds: tuple[int, int], steps: tuple[int, int]) -> None:
    n = 40_000
    a, b = (gumbel_noise(torch.tensor([seed]), step, n)[0] for seed, step in zip(seeds, steps, strict=True))
    for shift in (0, 1, 7):
        correlation = torch.corrcoef(torch.stack([a, b.roll(shift)]))[0, 1]
        assert abs(float(correlation)) < 4.5 / math.sqrt(n)
    assert len(set(a.tolist()) & set(b.tolist())) < n / 50  # 2^23 values: some coincide by chance, streams do not


def test_noise_has_no_structure_along_positions() -> None:
    noise = gumbel_noise(torch.tensor([1]), 0, 40_000)[0]
    for lag in (1, 2, 64, 512):
        correlation = torch.corrcoef(torch.stack([noise[:-lag], noise[lag:]]))[0, 1]
        assert abs(float(correlation)) < 4.5 / math.sqrt(len(noise))


def test_cold_relaxation_is_the_argmax_of_noisy_logits() -> None:
    torch.manual_seed(0)
    logits, seeds = torch.randn(3, 2, 2, 6), torch.tensor([1, 2, 3])
    noisy = logits + gumbel_noise(seeds, 4, 24).view_as(logits)
    relaxed = gumbel_softmax(logits, 1e-4, seeds, 4)
    torch.testing.assert_close(relaxed, F.one_hot(noisy.argmax(dim=-1), 6).float())
    warm = gumbel_softmax(logits, 0.7, seeds, 4)
    torch.testing.assert_close(warm, (noisy / 0.7).softmax(dim=-1))


def test_cold_samples_follow_the_categorical() -> None:
    logits = torch.tensor([0.0, 1.0, 2.5, -1.0])
    n = 4_000
    sample = gumbel_softmax(logits.expand(n, 1, 4), 1e-4, torch.arange(n), 0).sum(dim=(0, 1)) / n
    assert float((sample - logits.softmax(dim=0)).abs().max()) < 4 * math.sqrt(0.25 / n)


def test_relaxation_lets_gradients_through() -> None:
    torch.manual_seed(0)
    logits, seeds, direction = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([1, 2]), torch.randn(2, 3, 5)
    (gradient,) = torch.autograd.grad((gumbel_softmax(logits, 0.5, seeds, 0) * direction).sum(), logits)
    noisy = (logits + gumbel_noise(seeds, 0, 15).view_as(logits)) / 0.5
    (expected,) = torch.autograd.grad((noisy.softmax(dim=-1) * direction).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_kl_is_log_k_minus_entropy() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 5, 5, 32)
    expected = math.log(32) - Categorical(logits=logits).entropy()
    torch.testing.assert_close(kl_to_uniform(logits), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kl_to_uniform(logits).mean(), math.log(32) - Categorical(logits=logits).entropy().mean())
    assert torch.allclose(kl_to_uniform(torch.full((3, 8), 2.0)), torch.zeros(3), atol=1e-6)
    torch.testing.assert_close(
        kl_to_uniform(1e4 * F.one_hot(torch.arange(8), 8).float()), torch.full((8,), math.log(8))
    )


def test_kl_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kl_to_uniform, logits)
    (gradient,) = torch.autograd.grad(kl_to_uniform(logits).sum(), logits)
    (expected,) = torch.autograd.grad(-Categorical(logits=logits).entropy().sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_kl_does_not_depend_on_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).transpose(1, 2)
    found = []
    for rows in (1, 1 / 64, 1 / 512):  # of 8192 numbers: all, 8 rows, 1 row
        monkeypatch.setattr(gumbel, "_ROWS_AT_ONCE", rows)
        leaf = logits.clone().requires_grad_()
        kl = kl_to_uniform(leaf)
        found.append((kl.detach(), *torch.autograd.grad((kl * torch.arange(5.0)).sum(), leaf)))
    plain = torch.log_softmax(logits.requires_grad_(), dim=-1)
    kl = (plain.exp() * plain).sum(dim=-1) + math.log(16)
    wanted = (kl.detach(), *torch.autograd.grad((kl * torch.arange(5.0)).sum(), logits))
    for tensors in found:
        for ours, theirs in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
