"""Diffusion against closed forms: schedules, posterior, conversions, the bound."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dalle_scale.models.diffusion.process import (
    Diffusion,
    Target,
    betas_of,
    byte_nats,
    rate_and_distortion,
    to_bytes,
    to_map,
)

TARGETS: tuple[Target, ...] = ("eps", "x0", "v")


def test_linear_schedule_is_the_published_one() -> None:
    diffusion = Diffusion(betas_of("linear", 1000))
    assert float(diffusion.betas[0]) == 1e-4 and float(diffusion.betas[-1]) == pytest.approx(0.02, rel=1e-15)
    level = 1.0
    for step in range(1000):
        level *= 1 - (1e-4 + (0.02 - 1e-4) * step / 999)
        assert float(diffusion.alphas_cumprod[step]) == pytest.approx(level, rel=1e-12)
    assert float(diffusion.alphas_cumprod[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    # the paper, Sec. 4: KL(q(x_T | x0) || N(0, 1)) is about 1e-5 bits per value
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert 1e-6 < float(diffusion.prior_bits(to_map(images)).mean()) < 2e-5


def test_other_lengths_end_with_about_the_same_noise() -> None:
    last = {steps: float(Diffusion(betas_of("linear", steps)).alphas_cumprod[-1]) for steps in (250, 1000, 4000)}
    assert float(betas_of("linear", 4000)[-1]) == pytest.approx(0.005)
    assert all(math.log(level) == pytest.approx(math.log(last[1000]), rel=0.05) for level in last.values())


@pytest.mark.parametrize("steps", [10, 1000, 4000])
def test_cosine_schedule_by_its_formula(steps: int) -> None:
    diffusion = Diffusion(betas_of("cosine", steps))

    def level(t: int) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    for t in range(1, steps):  # the last beta is cut
        assert float(diffusion.alphas_cumprod[t - 1]) == pytest.approx(level(t), rel=1e-9)
    assert float(diffusion.betas[-1]) == 0.999 and float(diffusion.betas[:-1].max()) < 0.999


def posterior_mean(diffusion: Diffusion, x0: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t = x, x0) (arXiv 2006.11239, Eq. 7): the factor of x0 is the library's."""
    level = diffusion.alphas_cumprod[times]
    noisy = (1 - level / (1 - diffusion.betas[times])) * (1 - diffusion.betas[times]).sqrt() / (1 - level)
    return diffusion.factor("posterior_data", times, x) * x0 + noisy.view(-1, *[1] * (x.ndim - 1)) * x


@pytest.mark.parametrize(("schedule", "steps"), [("linear", 1000), ("cosine", 50)])
def test_posterior_by_the_rule_of_bayes(schedule: str, steps: int) -> None:
    diffusion = Diffusion(betas_of(schedule, steps))  # type: ignore[arg-type]
    torch.manual_seed(0)
    x0, x = torch.randn(steps, dtype=torch.float64), torch.randn(steps, dtype=torch.float64)
    found = posterior_mean(diffusion, x0, x, torch.arange(steps))
    for time in range(1, steps):
        beta, before = float(diffusion.betas[time]), float(diffusion.alphas_cumprod[time - 1])
        # N(x; sqrt(1 - beta) y, beta) N(y; sqrt(before) x0, 1 - before) as a density of y: precisions add up
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) / beta * x[time] + math.sqrt(before) / (1 - before) * x0[time]) / precision
        assert float(found[time]) == pytest.approx(float(mean), rel=1e-9, abs=1e-12)
        assert float(diffusion.posterior_variance[time]) == pytest.approx(1 / precision, rel=1e-9)
    assert float(found[0]) == pytest.approx(float(x0[0]), rel=1e-12)
    assert float(diffusion.posterior_variance[0]) == 0


def test_noisy_is_the_chain_of_single_steps() -> None:
    """Mean and variance after t steps x -> sqrt(1 - beta) x + sqrt(beta) noise."""
    diffusion = Diffusion(betas_of("cosine", 30))
    mean, variance = 1.0, 0.0
    for time, beta in enumerate(diffusion.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        one, zero, times = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1), torch.tensor([time])
        assert float(diffusion.noisy(one, times, zero.double())) == pytest.approx(mean, rel=1e-10)
        assert float(diffusion.noisy(zero.double(), times, one)) ** 2 == pytest.approx(variance, rel=1e-10)


def noise_of(diffusion: Diffusion, x0: Tensor, x: Tensor, times: Tensor) -> Tensor:
    """The noise in x, given the map x0."""
    return (x - diffusion.factor("signal", times, x) * x0) / diffusion.factor("noise", times, x)


@pytest.mark.parametrize(("kind", "schedule"), product(TARGETS, ("linear", "cosine")))
def test_conversions_come_back_at_every_time(kind: Target, schedule: str) -> None:
    diffusion = Diffusion(betas_of(schedule, 1000))  # type: ignore[arg-type]
    times = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x = diffusion.noisy(x0, times, noise)
    predicted = diffusion.target(kind, x0, noise, times)
    found = diffusion.x0(kind, predicted, x, times)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)
    for other in TARGETS:  # and through any other
        again = diffusion.target(other, found, noise_of(diffusion, found, x, times), times)
        torch.testing.assert_close(again, diffusion.target(other, x0, noise, times), rtol=1e-7, atol=1e-7)


def test_log_variances() -> None:
    diffusion, times = Diffusion(betas_of("linear", 1000)), torch.arange(1000)
    like = torch.empty(1000, 1, dtype=torch.float64)
    small, large = (diffusion.log_variance(kind, times, like) for kind in ("fixed_small", "fixed_large"))
    torch.testing.assert_close(large[1:, 0], diffusion.betas[1:].log())
    torch.testing.assert_close(small[1:, 0], diffusion.posterior_variance[1:].log())
    assert float(small[0]) == float(large[0]) == pytest.approx(math.log(float(diffusion.posterior_variance[1])))
    assert small.isfinite().all() and (small <= large).all()
    share = torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.float64).expand(1000, 3)
    learned = diffusion.log_variance("learned", times, like.expand(1000, 3), share)
    beta = diffusion.betas.log()[:, None]
    torch.testing.assert_close(learned[:, :1], small)
    torch.testing.assert_close(learned[:, 1:2], 0.75 * small + 0.25 * beta)
    torch.testing.assert_close(learned[:, 2:], beta)


def test_bytes_come_back() -> None:
    levels = torch.arange(256).to(torch.uint8)
    assert torch.equal(to_bytes(to_map(levels)), levels)
    assert to_map(levels).min() == -1 and to_map(levels).max() == 1
    assert to_bytes(torch.tensor([-1.4, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3])
@pytest.mark.parametrize("mean", [-1.2, -0.31, 0.0, 0.99])
def test_bytes_are_a_distribution(mean: float, std: float) -> None:
    levels = torch.arange(256).to(torch.uint8)
    wide = torch.full((256,), mean), torch.full((256,), 2 * math.log(std))
    nats = byte_nats(levels, *wide)
    assert nats.isfinite().all() and float(torch.exp(-nats.double()).sum()) == pytest.approx(1, abs=1e-5)
    normal = Normal(torch.tensor(mean, dtype=torch.float64), std)
    edges = (torch.arange(257, dtype=torch.float64) * 2 - 256) / 255
    edges[0], edges[-1] = -math.inf, math.inf
    expected = normal.cdf(edges[1:]) - normal.cdf(edges[:-1])
    torch.testing.assert_close(torch.exp(-nats.double()), expected, rtol=2e-3, atol=1e-6)


def test_bytes_far_away_keep_their_gradients() -> None:
    levels = torch.tensor([0, 1, 254, 255, 128, 128]).to(torch.uint8)
    mean = torch.tensor([3.0, 3.0, -3.0, -3.0, 1.0, -1.0], requires_grad=True)
    log_variance = torch.full((6,), -12.0, requires_grad=True)
    byte_nats(levels, mean, log_variance).sum().backward()
    assert mean.grad is not None and log_variance.grad is not None
    assert mean.grad.sign().tolist() == [1, 1, -1, -1, 1, -1] and mean.grad.isfinite().all()
    assert (log_variance.grad < 0).all() and log_variance.grad.isfinite().all()


def test_predictions_far_off_at_late_times_keep_gradients_finite() -> None:
    """A net that reads noise at the last time of the cosine schedule is off by tens of thousands in the image."""
    diffusion = Diffusion(betas_of("cosine", 1000))
    images = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x0, times = to_map(images), torch.tensor([0, 1, 999])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x = diffusion.noisy(x0, times, noise)
    predicted = diffusion.x0("eps", noise + torch.tensor([0.5, 0.5, 5]).view(3, 1, 1, 1), x, times)
    assert float(predicted[2].abs().max()) > 5e4
    share = torch.full_like(x0, 0.5, requires_grad=True)
    bits = diffusion.bound_bits(images, x0, predicted, diffusion.log_variance("learned", times, x, share), times)
    bits.sum().backward()
    assert share.grad is not None and share.grad.isfinite().all() and share.grad.any(dim=(1, 2, 3)).all()


def test_terms_of_the_bound_against_torch() -> None:
    """Each time on its own, with the variance of each value: KL of the two normal distributions, in bits."""
    diffusion, generator = Diffusion(betas_of("cosine", 12)), torch.Generator().manual_seed(0)
    times = torch.arange(12)
    images = torch.randint(256, (12, 3, 4, 4), generator=generator).to(torch.uint8)
    x0 = to_map(images)
    x = diffusion.noisy(x0, times, torch.randn(x0.shape, generator=generator))
    predicted = (x0 + 0.3 * torch.randn(x0.shape, generator=generator)).clamp(-1, 1)
    share = torch.rand(x0.shape, generator=generator)
    log_variance = diffusion.log_variance("learned", times, x, share)
    found = diffusion.bound_bits(images, x0, predicted, log_variance, times)
    doubles = (x0.double(), x.double(), predicted.double())
    q_mean, p_mean = (posterior_mean(diffusion, image, doubles[1], times) for image in doubles[::2])
    p = Normal(p_mean, torch.exp(0.5 * log_variance.double()))
    q = Normal(q_mean[1:], diffusion.posterior_variance[1:, None, None, None].sqrt().expand_as(q_mean[1:]))
    expected = kl_divergence(q, Normal(p.mean[1:], p.stddev[1:])).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(found[1:].double(), expected, rtol=1e-4, atol=1e-7)
    first = byte_nats(images[:1], predicted[:1], log_variance[:1]).mean() / math.log(2)
    torch.testing.assert_close(found[0], first)
    # without bytes, time 0 counts as if q were as wide as at time 1
    latents = diffusion.bound_bits(None, x0, predicted, log_variance, times)
    torch.testing.assert_close(latents[1:], found[1:])
    wide = Normal(q_mean[0], float(diffusion.posterior_variance[1]) ** 0.5)
    expected = kl_divergence(wide, Normal(p.mean[0], p.stddev[0])).mean() / math.log(2)
    torch.testing.assert_close(latents[0].double(), expected, rtol=1e-4, atol=1e-7)


def crooked(diffusion: Diffusion, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """A wrong model with a variance of its own at each value."""
    share = torch.sigmoid(x)
    return torch.tanh(x) * 0.8, diffusion.log_variance("learned", times, x, share)


def test_bound_against_numeric_integration() -> None:
    """T = 3 and one value: the expectation over each x_t as a midpoint sum."""
    diffusion, image = Diffusion(betas_of("cosine", 3)), torch.full((1, 1), 180).to(torch.uint8)
    x0, width = float(to_map(image)), 1e-3
    z = torch.arange(-8, 8, width, dtype=torch.float64) + width / 2
    weights = Normal(torch.zeros(1, dtype=torch.float64), 1.0).log_prob(z).exp() * width
    sums = []
    for time in range(3):
        level = float(diffusion.alphas_cumprod[time])
        x, times = (math.sqrt(level) * x0 + math.sqrt(1 - level) * z)[:, None], torch.full((len(z),), time)
        mean, log_variance = crooked(diffusion, x, times)
        if time == 0:
            normal = Normal(mean, torch.exp(log_variance / 2))
            bits = -torch.log2(normal.cdf(torch.tensor(106 / 255)) - normal.cdf(torch.tensor(104 / 255)))
        else:
            real = torch.full_like(x, x0)
            q = Normal(posterior_mean(diffusion, real, x, times), diffusion.posterior_variance[time].sqrt())
            p = Normal(posterior_mean(diffusion, mean, x, times), torch.exp(log_variance / 2))
            bits = kl_divergence(q, p) / math.log(2)
        sums.append(float((weights * bits[:, 0]).sum()))
    share = float(diffusion.alphas_cumprod[-1])
    last = Normal(torch.tensor(math.sqrt(share) * x0), torch.tensor(math.sqrt(1 - share)))
    prior = float(kl_divergence(last, Normal(0.0, 1.0))) / math.log(2)
    copies = 40_000
    rate, distortion = rate_and_distortion(
        diffusion, lambda x, times: crooked(diffusion, x, times), image.expand(copies, 1), torch.arange(copies)
    )
    assert float(distortion.mean()) == pytest.approx(sums[0], rel=0.02)
    assert float(rate.mean()) == pytest.approx(prior + sums[1] + sums[2], rel=0.02)
    assert abs(sums[1] + sums[2] - sums[0]) > 0.1 * sums[0], "terms that are equal would prove less"


def world(count: int) -> tuple[Tensor, float]:
    """Bytes from a normal distribution, uint8 [count, 16], and what they cost under it in bits a value."""
    levels = torch.arange(256, dtype=torch.float64)
    shares = torch.exp(-0.5 * ((levels - 120) / 25) ** 2)
    shares /= shares.sum()
    images = torch.multinomial(shares, count * 16, replacement=True, generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8).view(count, 16), float(-shares[images].log2().mean())


def true_reverse(diffusion: Diffusion, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The best x0 and the variance of q(x_{t-1} | x_t), for pixels from N(120, 25^2) on the scale of bytes."""
    mean, variance = 120 / 127.5 - 1, (25 / 127.5) ** 2
    levels = diffusion.alphas_cumprod[times][:, None]
    # x = sqrt(a) x0 + sqrt(1 - a) noise: precisions add up
    left = 1 / (1 / variance + levels / (1 - levels))
    best = left * (mean / variance + levels.sqrt() / (1 - levels) * x)
    before = torch.cat([torch.ones(1, dtype=torch.float64), diffusion.alphas_cumprod[:-1]])[times][:, None]
    pull = before.sqrt() * diffusion.betas[times][:, None] / (1 - levels)
    wide = diffusion.posterior_variance[times][:, None] + pull.square() * left
    return best.float(), wide.log().float().expand_as(x)


def test_bound_is_tight_where_the_model_is_the_truth() -> None:
    """Images of independent normal pixels: the best model is known, and its bound is -log2 p(x) itself."""
    diffusion = Diffusion(betas_of("cosine", 30))
    images, cost = world(2000)
    seeds = torch.arange(len(images))

    def bits(predict: object, steps: int = 0) -> float:
        rate, distortion = rate_and_distortion(diffusion, predict, images, seeds, steps)  # type: ignore[arg-type]
        return float((rate + distortion).mean())

    assert bits(lambda x, times: true_reverse(diffusion, x, times)) == pytest.approx(
        cost, abs=0.025
    )  # 2.7 standard errors

    def fixed(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        best, _ = true_reverse(diffusion, x, times)
        return best, diffusion.log_variance("fixed_large", times, x)

    assert cost + 0.05 < bits(fixed)
    # a part of the times gives the same in the mean
    assert bits(fixed, steps=4) == pytest.approx(bits(fixed), abs=0.05)
    assert bits(lambda x, times: true_reverse(diffusion, x, times), steps=1) == pytest.approx(cost, abs=0.1)


def test_estimate_has_no_bias_and_more_times_spread_less() -> None:
    diffusion, copies = Diffusion(betas_of("cosine", 40)), 2000
    image = torch.tensor([[30, 200, 90, 128]]).to(torch.uint8).expand(copies, 4)
    seeds = torch.arange(copies)

    def predict(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return crooked(diffusion, x, times)

    exact = rate_and_distortion(diffusion, predict, image, seeds)[0]
    spreads = []
    for steps in (1, 8):
        rate = rate_and_distortion(diffusion, predict, image, seeds, steps)[0]
        spreads.append(float(rate.std()))
        assert float(rate.mean()) == pytest.approx(float(exact.mean()), abs=4 * spreads[-1] / math.sqrt(copies))
    assert spreads[1] < 0.6 * spreads[0]
    seen: list[int] = []
    rate_and_distortion(
        diffusion, predict, image[:2], seeds[:2], watch=lambda times: (seen.append(t) or t for t in times)
    )
    assert seen == list(range(1, 40))
