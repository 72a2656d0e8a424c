"""The samplers beside closed forms: Gaussian data, whose best prediction, marginals and probability flow are known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_scale.config import parse
from dalle_scale.models.diffusion.samplers import (
    Options,
    ddim_step,
    decode,
    encode,
    follow,
    guided,
    interpolate,
    pairs,
    plan,
    sample,
    times,
)
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.types import UserError

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)  # arXiv 2006.11239, Sec. 4
LOG_SNR_LINE = torch.sigmoid(2 * torch.linspace(8, -4, 321, dtype=torch.float64))  # even in log-SNR, from nearly clean
MEAN, STD = torch.tensor([0.3, -0.5, 0.0]).double(), torch.tensor([0.25, 0.6, 1.0]).double()


def gaussian(alphas_cumprod: Tensor):
    """The best prediction E[x0 | x] of x0 ~ N(MEAN, STD^2)."""

    def predict(x: Tensor, at: Tensor):
        a = alphas_cumprod[at][:, None]
        return MEAN + STD**2 * a.sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a), None

    return predict


def on_path(u: Tensor, a: float | Tensor) -> Tensor:
    """Where the exact probability flow of that data stands at a: x is standardised to the same u at all times."""
    a = torch.as_tensor(a, dtype=torch.float64)
    return a.sqrt() * MEAN + (a * STD**2 + 1 - a).sqrt() * u


def wavy(x: Tensor, at: Tensor):
    """An arbitrary model, value by value."""
    return torch.sin(3 * x + at.view(-1, *[1] * (x.ndim - 1))) * 1.5, None


def test_times_of_the_papers_code():
    assert times(LINEAR, 10) == list(range(0, 1000, 100))
    assert times(LINEAR, 1000) == times(LINEAR) == list(range(1000))
    assert times(LINEAR, 10, "quadratic") == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    for steps in (10, 20, 50, 100, 1000):
        assert times(LINEAR, steps) == list(range(0, 1000, 1000 // steps))
    for num_times in (1000, 400, 37):
        for steps in range(2, num_times + 1):
            published = [int(time) for time in np.linspace(0, np.sqrt(num_times * 0.8), steps) ** 2]
            assert times(LINEAR[:num_times], steps, "quadratic") == sorted(set(published))


def test_every_number_of_uniform_steps_is_exact():
    for steps in range(2, 1001):
        found = times(LINEAR, steps)
        gaps = np.diff([*found, 1000])
        assert len(found) == steps and found[0] == 0 and gaps.max() - gaps.min() <= 1


def test_log_snr_times_are_even_and_hold_both_ends():
    assert times(LOG_SNR_LINE, 21, "log_snr") == list(range(0, 321, 16))
    found = times(LINEAR, 20, "log_snr")
    assert found[0] == 0 and found[-1] == 999
    gaps = torch.logit(LINEAR[found]).diff()
    assert gaps[4:].max() / gaps[4:].min() == pytest.approx(1, abs=0.1)  # the first times lie wider apart than that


def test_spacing_left_open():
    for method, spacing in (("ancestral", "uniform"), ("ddim", "uniform"), ("dpm++", "log_snr")):
        assert plan(LINEAR, Options(method=method, steps=20)) == plan(
            LINEAR, Options(method=method, steps=20, spacing=spacing)
        )


def test_pairs_end_at_the_image():
    assert pairs(times(LINEAR, 4)) == [(750, 500), (500, 250), (250, 0), (0, -1)]
    assert pairs(times(LINEAR, 4, "quadratic")) == [(800, 355), (355, 88), (88, 0), (0, -1)]


def test_repeated_times_of_the_code_move_nothing():
    """The published quadratic list of 50 steps holds 0 twice; a step between equal levels keeps x."""
    assert len(times(LINEAR, 50, "quadratic")) == 49
    step = ddim_step(0, LINEAR[0].item(), LINEAR[0].item(), 1.0)
    assert (step.keep, step.std) == (1, 0) and step.data == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("steps", [1000, 50])
def test_ddim_with_eta_1_is_ancestral_with_the_small_variance(steps):
    ours = plan(LINEAR, Options(method="ddim", steps=steps, eta=1.0))
    theirs = plan(LINEAR, Options(method="ancestral", steps=steps, variance="fixed_small"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.time == b.time
        assert (a.keep, a.data, a.std) == pytest.approx((b.keep, b.data, b.std), rel=1e-9, abs=1e-12)


def test_ancestral_over_some_times_is_the_papers_sigma_hat():
    """The mean of eta 1 with noise of deviation sqrt(1 - a / a_next) (arXiv 2010.02502, Sec. 5), none at the end."""
    moves = pairs(times(LINEAR, 20, "quadratic"))
    wide, one = (
        plan(LINEAR, Options(steps=20, spacing="quadratic", **how))
        for how in ({"method": "ancestral"}, {"method": "ddim", "eta": 1.0})
    )
    for (now, after), a, b in zip(moves, wide, one, strict=True):
        assert (a.keep, a.data) == pytest.approx((b.keep, b.data), rel=1e-9, abs=1e-12)
        assert a.std == pytest.approx(math.sqrt(1 - LINEAR[now] / LINEAR[after]) if after >= 0 else 0)


def test_ancestral_is_the_papers_algorithm_2():
    """x = (x - beta / sqrt(1 - a) eps) / sqrt(alpha) + sqrt(beta) z, in the noise that the model predicts."""
    seeds = torch.tensor([5, -7])
    eps_of = lambda x, at: torch.tanh(x + at[:, None] / 500)  # noqa: E731

    def predict(x: Tensor, at: Tensor):
        a = LINEAR[at][:, None]
        return (x - (1 - a).sqrt() * eps_of(x.double(), at)) / a.sqrt(), None

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    x = normal_noise(seeds, 1000, 3).double()
    for t in reversed(range(1000)):
        noise = normal_noise(seeds, t, 3).double() if t else 0.0
        eps = eps_of(x, torch.full((2,), t))
        x = (x - betas[t] / (1 - LINEAR[t]).sqrt() * eps) / (1 - betas[t]).sqrt() + betas[t].sqrt() * noise
    drawn = sample(predict, LINEAR, seeds, (3,), Options(clip=False))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1000, 10])
def test_large_variance_is_exact_for_normal_data(steps):
    """x0 ~ N(0, 1), whose best prediction is sqrt(a) x: every marginal is N(0, 1) (arXiv 2006.11239, Sec. 3.2)."""
    for step in plan(LINEAR, Options(steps=steps))[:-1]:
        assert (step.keep + step.data * LINEAR[step.time].sqrt().item()) ** 2 + step.std**2 == pytest.approx(1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_marginals_are_exact_for_one_image(eta):
    """x0 one point, predicted without error: x at a is N(sqrt(a) x0, 1 - a), for every eta (2010.02502, Eq. 7)."""
    moves = pairs(times(LINEAR, 20, "quadratic"))
    for (now, after), step in zip(
        moves, plan(LINEAR, Options(method="ddim", steps=20, spacing="quadratic", eta=eta)), strict=True
    ):
        a, a_next = LINEAR[now].item(), LINEAR[after].item() if after >= 0 else 1.0
        assert step.keep * math.sqrt(a) + step.data == pytest.approx(math.sqrt(a_next))
        assert step.keep**2 * (1 - a) + step.std**2 == pytest.approx(1 - a_next, abs=1e-15)
        small = (1 - a_next) / (1 - a) * (1 - a / a_next)
        assert step.std**2 == pytest.approx(eta**2 * small, abs=1e-15)


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_order_of_convergence(method):
    """Errors against the exact flow fall as 1 / steps for DDIM, as 1 / steps^2 for DPM-Solver++."""
    u = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(-1, 3)
    start, end = on_path(u, LOG_SNR_LINE[-1]), on_path(u, 1.0)
    errors = []
    for steps in (21, 41, 81, 161):
        moves = plan(LOG_SNR_LINE, Options(method=method, steps=steps, spacing="log_snr"))
        found = follow(gaussian(LOG_SNR_LINE), moves, start, clip=False)
        errors.append((found - end).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    expected = 1 if method == "ddim" else 2
    assert orders[-1] == pytest.approx(expected, abs=0.1)
    assert all(order > expected - 0.3 for order in orders)
    assert errors[-1] < (0.05 if method == "ddim" else 0.001)


def test_encoding_in_the_noise_that_the_model_predicts():
    """x = sqrt(a_next) x0 + sqrt(1 - a_next) eps, with x0 and eps at the time before; at first x0 is the image."""

    def eps(x: Tensor, at: int) -> Tensor:
        a = LINEAR[at]
        return (x - a.sqrt() * wavy(x, torch.tensor([at]))[0]) / (1 - a).sqrt()

    image = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
    noise = eps(image, 0)
    x = LINEAR[0].sqrt() * image + (1 - LINEAR[0]).sqrt() * noise
    for now, after in ((0, 333), (333, 666)):
        noise, a, a_next = eps(x, now), LINEAR[now], LINEAR[after]
        x = a_next.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - a_next).sqrt() * noise
    torch.testing.assert_close(encode(wavy, LINEAR, image, 3), x, rtol=1e-9, atol=1e-9)


def test_encoding_finds_the_latents_and_decoding_the_images():
    predict, u = gaussian(LINEAR), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None].expand(-1, 3)
    images = on_path(u, 1.0)
    latent_errors, trip_errors = [], []
    for steps in (10, 20, 50, 100, 1000):
        latents = encode(predict, LINEAR, images, steps)
        last = times(LINEAR, steps)[-1]
        latent_errors.append((latents - on_path(u, LINEAR[last])).abs().max().item())
        trip_errors.append((decode(predict, LINEAR, latents, steps) - images).abs().max().item())
    for errors in (latent_errors, trip_errors):
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]


@pytest.mark.parametrize(
    "options",
    [
        Options(steps=100, clip=False),
        Options(steps=100, variance="fixed_small", clip=False),
        Options(method="ddim", steps=50, spacing="quadratic", eta=0.5),
        Options(method="ddim", steps=100),
    ],
)
def test_noise_is_fresh_in_every_step(options):
    """Mean and variance of 10 000 images are those of the steps' sums of independent normal numbers, and near the
    data's. Four standard errors."""
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for step in plan(LINEAR, options):
        a = LINEAR[step.time]
        slope = STD**2 * a.sqrt() / (a * STD**2 + 1 - a)
        gain = step.keep + step.data * slope
        mean, variance = gain * mean + step.data * MEAN * (1 - slope * a.sqrt()), gain**2 * variance + step.std**2
    found = sample(gaussian(LINEAR), LINEAR, torch.arange(10_000), (3,), options).double()
    assert ((found.mean(dim=0) - mean).abs() < 0.04 * variance.sqrt()).all()
    assert ((found.var(dim=0) / variance).log().abs() < 4 * math.sqrt(2 / 10_000)).all()
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(variance.sqrt(), STD, rtol=0.12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        Options(steps=20),
        Options(method="ddim", steps=20, spacing="quadratic", eta=0.7, clip=True),
        Options(method="dpm++", steps=10, spacing="log_snr"),
    ],
)
def test_images_depend_on_their_seed_only(options):
    seeds = torch.tensor([3, 2**62, 0, 3, 11])
    drawn = sample(wavy, LINEAR, seeds, (2, 4, 4), options)
    assert drawn.shape == (5, 2, 4, 4) and torch.equal(drawn[0], drawn[3])
    assert torch.equal(sample(wavy, LINEAR, seeds.flip(0), (2, 4, 4), options), drawn.flip(0))
    for index in range(5):
        assert torch.equal(sample(wavy, LINEAR, seeds[index : index + 1], (2, 4, 4), options)[0], drawn[index])
    assert len({image.numpy().tobytes() for image in drawn}) == 4


def test_only_noisy_steps_draw_noise():
    """Same start, same end without eta; with it, the noise of every step is another."""
    seeds = torch.tensor([1, 2])
    still = sample(wavy, LINEAR, seeds, (4,), Options(method="ddim", steps=2, eta=0.0))
    assert torch.equal(still, sample(wavy, LINEAR, seeds, (4,), Options(method="ddim", steps=2)))
    first, last = plan(LINEAR, Options(method="ddim", steps=2, eta=1.0))
    assert first.std > 0 and last.std == 0
    start, noise = normal_noise(seeds, 1000, 4), normal_noise(seeds, first.time, 4)
    x = first.keep * start + first.data * wavy(start, torch.tensor([500, 500]))[0] + first.std * noise
    expected = last.keep * x + last.data * wavy(x, torch.tensor([0, 0]))[0]
    assert torch.equal(sample(wavy, LINEAR, seeds, (4,), Options(method="ddim", steps=2, eta=1.0)), expected)


def test_a_learned_variance_lies_between_the_fixed_ones():
    seeds = torch.tensor([1, 2, 3])
    for share, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):

        def predict(x: Tensor, at: Tensor, share=share):
            return wavy(x, at)[0], torch.full_like(x, share)

        learned = sample(predict, LINEAR, seeds, (4,), Options(steps=30), learned=True)
        fixed = sample(predict, LINEAR, seeds, (4,), Options(steps=30, variance=variance), learned=True)
        torch.testing.assert_close(learned, fixed, rtol=1e-4, atol=1e-4)
    [step, *_] = plan(LINEAR, Options(steps=30), learned=True)
    small, large = (plan(LINEAR, Options(steps=30, variance=f"fixed_{size}"))[0].std for size in ("small", "large"))
    assert step.log_variances == pytest.approx((2 * math.log(small), 2 * math.log(large)))


def test_clipping():
    """Ancestral clips x0 as DDPM's code does, DDIM does not, and both do as told."""
    seeds, wild = torch.tensor([1, 2]), lambda x, at: (4 * x, None)
    assert sample(wild, LINEAR, seeds, (4,), Options(steps=10)).abs().max() <= 1
    assert sample(wild, LINEAR, seeds, (4,), Options(method="ddim", steps=10)).abs().max() > 1
    assert sample(wild, LINEAR, seeds, (4,), Options(method="ddim", steps=10, clip=True)).abs().max() <= 1
    assert sample(wild, LINEAR, seeds, (4,), Options(method="dpm++", steps=10, clip=True)).abs().max() <= 1


def test_interpolation_follows_the_arc():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 3, 3, 8, 8, generator=generator)
    end = end * (start.flatten(1).norm(dim=1) / end.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    path = interpolate(start, end, 5)
    assert path.shape == (3, 5, 3, 8, 8) and path.dtype == torch.float32
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, -1], end)
    lengths = path.flatten(2).norm(dim=2)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(-1, 5))
    cosines = torch.cosine_similarity(path[:, :-1].flatten(2), path[:, 1:].flatten(2), dim=2)
    torch.testing.assert_close(cosines, cosines[:, :1].expand(-1, 4))
    torch.testing.assert_close(interpolate(start, start, 3), start[:, None].expand(-1, 3, -1, -1, -1))


def test_guidance_of_x0_is_guidance_of_the_noise():
    text, empty = torch.tensor([[1], [2]]), torch.tensor([7])
    x, at = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([300, 300])
    calls = []

    def predict(x: Tensor, at: Tensor, text: Tensor):
        calls.append(len(x))
        return torch.sin(x * text) + at[:, None] / 1000, torch.sigmoid(x * text)

    x0, share = guided(predict, text, empty, 3.0)(x, at)
    assert calls == [4]
    a = LINEAR[300]
    with_caption, without = (predict(x, at, tokens)[0] for tokens in (text, empty.expand(2, 1)))
    caption_noise, empty_noise = ((x - a.sqrt() * found) / (1 - a).sqrt() for found in (with_caption, without))
    noise = empty_noise + 3 * (caption_noise - empty_noise)
    torch.testing.assert_close(x0, (x - (1 - a).sqrt() * noise) / a.sqrt())
    assert torch.equal(share, torch.sigmoid(x * text))
    calls.clear()
    assert torch.equal(guided(predict, text, empty, 1.0)(x, at)[0], with_caption) and calls == [2]
    assert torch.equal(guided(predict, text, empty, 0.0)(x, at)[0], without)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "euler"}, r"method = 'euler': Input should be 'ancestral', 'ddim' or 'dpm\+\+'"),
        ({"spacing": "cubic"}, "spacing = 'cubic': Input should be 'uniform', 'quadratic' or 'log_snr'"),
        ({"variance": "huge"}, "variance = 'huge': Input should be 'fixed_small', 'fixed_large' or 'learned'"),
        ({"steps": 1}, "steps = 1: Input should be greater than or equal to 2"),
        ({"method": "ddim", "eta": 1.5}, "eta = 1.5: Input should be less than or equal to 1"),
        ({"method": "ddim", "eta": -0.1}, "eta = -0.1: Input should be greater than or equal to 0"),
        ({"method": "ddim", "eta": math.nan}, "eta = nan: Input should be"),
        ({"eta": 0.5}, "eta: is for method 'ddim'; leave it out with 'ancestral'"),
        ({"method": "dpm++", "variance": "fixed_small"}, "variance: is for method 'ancestral'"),
        ({"guidance": -1.0}, "guidance = -1.0: Input should be greater than or equal to 0"),
    ],
)
def test_wrong_options_are_said_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        parse(Options, values, "options").resolved(10, learned=False)
    assert "\n" not in str(error.value)


def test_what_the_model_does_not_have():
    with pytest.raises(UserError, match="steps: 1001, but this model has 1000 times; take 2 to 1000"):
        sample(wavy, LINEAR, torch.tensor([1]), (4,), Options(steps=1001))
    with pytest.raises(UserError, match="steps: 1, but this model has 1000 times"):
        encode(wavy, LINEAR, torch.zeros(1, 4), 1)
    with pytest.raises(UserError, match="spacing: 'cubic' is none of uniform"):
        encode(wavy, LINEAR, torch.zeros(1, 4), 10, "cubic")
    with pytest.raises(UserError, match="this model has learned none"):
        plan(LINEAR, Options(variance="learned"))
    with pytest.raises(UserError, match="at least its two ends"):
        interpolate(torch.ones(1, 2), torch.ones(1, 2), 1)
