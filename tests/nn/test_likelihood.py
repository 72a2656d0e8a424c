"""Densities against numeric integration and torch.distributions; the pixel map against the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, SigmoidTransform, TransformedDistribution

from dalle_scale.nn.likelihoods import (
    Bernoulli,
    DiscretisedLogistic,
    Gaussian,
    LogitLaplace,
    phi,
    phi_inverse,
    to_bytes,
)

LEVELS = phi(torch.arange(256)).view(1, 1, 1, 256).expand(1, 3, 1, 256)  # every byte, in phi space


def maps_of(mu: float, ln_b: float, shape: tuple[int, ...]) -> Tensor:
    """Decoder maps with one location and one scale everywhere."""
    return torch.cat([torch.full((1, 3, *shape), mu), torch.full((1, 3, *shape), ln_b)], dim=1)


@pytest.mark.parametrize("mu", [-2.0, 0.0, 1.3])
@pytest.mark.parametrize("ln_b", [-2.0, 0.0, 0.5])
@pytest.mark.parametrize("floor", [None, -1.0])
def test_logit_laplace_integrates_to_one(mu: float, ln_b: float, floor: float | None) -> None:
    # midpoints in y = logit x, where the density has no poles: dx = x (1 - x) dy
    step = 1e-3
    y = torch.arange(-14.0, 14.0, step, dtype=torch.float64) + step / 2
    x = torch.sigmoid(y)[None, None, None].expand(1, 3, 1, -1)
    nll = LogitLaplace(floor).nll(maps_of(mu, ln_b, (1, len(y))), x)
    integral = (torch.exp(-nll[0, 0, 0]) * (x * (1 - x))[0, 0, 0]).sum() * step
    scale = math.exp(ln_b) + (math.exp(floor) if floor is not None else 0)
    tails = 0.5 * (math.exp(-(14 - mu) / scale) + math.exp(-(14 + mu) / scale))
    assert float(integral) == pytest.approx(1 - tails, abs=1e-4)


def test_logit_laplace_is_a_laplace_variable_through_a_sigmoid() -> None:
    torch.manual_seed(0)
    x = phi(torch.randint(256, (2, 3, 5, 4)))
    maps = torch.randn(2, 6, 5, 4)
    reference = TransformedDistribution(Laplace(maps[:, :3], maps[:, 3:].exp()), SigmoidTransform())
    torch.testing.assert_close(LogitLaplace().nll(maps, x), -reference.log_prob(x), rtol=1e-4, atol=1e-4)


def test_logit_laplace_by_the_formula() -> None:
    mu, ln_b, x = 0.3, -0.7, 0.62
    b = math.exp(ln_b)
    density = 1 / (2 * b * x * (1 - x)) * math.exp(-abs(math.log(x / (1 - x)) - mu) / b)
    nll = LogitLaplace().nll(maps_of(mu, ln_b, (1, 1)), torch.full((1, 3, 1, 1), x))
    torch.testing.assert_close(nll, torch.full((1, 3, 1, 1), -math.log(density)))


def test_floor_bounds_the_scale_and_keeps_its_gradient() -> None:
    ln_b = torch.tensor([-20.0, 3.0])
    maps = torch.cat([torch.zeros(1, 3, 1, 2), ln_b.expand(1, 3, 1, 2)], dim=1).requires_grad_()
    target = torch.full((1, 3, 1, 2), 0.5)  # logit 0 = mu: nll is ln b + constant
    bounded = LogitLaplace(-2.0).nll(maps, target) - LogitLaplace(None).nll(maps_of(0.0, 0.0, (1, 2)), target)
    assert bounded[0, 0, 0].tolist() == pytest.approx([-2.0, math.log(math.exp(3) + math.exp(-2))], abs=1e-5)
    (gradient,) = torch.autograd.grad(LogitLaplace(-2.0).nll(maps, torch.full((1, 3, 1, 2), 0.8)).sum(), maps)
    assert gradient.isfinite().all() and gradient[:, 3:].ne(0).all()


def test_gaussian_is_normal() -> None:
    torch.manual_seed(0)
    x, maps = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(Gaussian(0.05).nll(maps, x), -Normal(maps, 0.05).log_prob(x), rtol=1e-4, atol=1e-4)


def test_gaussian_with_learned_std_is_normal() -> None:
    torch.manual_seed(0)
    x, maps = torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4) - 1
    reference = -Normal(maps[:, :3], maps[:, 3:].exp()).log_prob(x)
    torch.testing.assert_close(Gaussian(None).nll(maps, x), reference, rtol=1e-4, atol=1e-4)
    reference = -Normal(maps[:, :3], maps[:, 3:].exp() + math.exp(-2)).log_prob(x)
    torch.testing.assert_close(Gaussian(None, ln_std_floor=-2.0).nll(maps, x), reference, rtol=1e-4, atol=1e-4)
    assert (Gaussian(0.1).channels, Gaussian(None).channels) == (3, 6)


def test_bernoulli_is_of_bits() -> None:
    torch.manual_seed(0)
    maps = 3 * torch.randn(2, 3, 4, 4)
    bits = torch.randint(2, (2, 3, 4, 4))
    nll = Bernoulli().nll(maps, phi(255 * bits))
    torch.testing.assert_close(nll, -torch.distributions.Bernoulli(logits=maps).log_prob(bits.float()))
    on, off = (Bernoulli().nll(maps, phi(torch.full((2, 3, 4, 4), byte))) for byte in (255.0, 0.0))
    torch.testing.assert_close(torch.exp(-on) + torch.exp(-off), torch.ones(2, 3, 4, 4))
    share = torch.randint(256, (2, 3, 4, 4)) / 255
    mixed = Bernoulli().nll(maps, phi(255 * share))
    torch.testing.assert_close(mixed, share * on + (1 - share) * off, rtol=1e-5, atol=1e-5)


LOCATIONS, LN_SCALES = (-1.5, -1.0, -0.9961, -0.2, 0.0, 0.37, 1.0, 2.0), (-20.0, -6.0, -4.0, -1.0, 1.0, 4.0)


def brute_force(location: float, ln_scale: float, floor: float) -> Tensor:
    """-log of differences of the distribution function, fp64 [256], summed from the side where it is small."""
    scale = math.exp(ln_scale) + math.exp(floor)
    edges = (torch.arange(257, dtype=torch.float64) - 128) * 2 / 255
    edges[0], edges[256] = -math.inf, math.inf
    logits = (edges - location) / scale
    left, right = torch.sigmoid(logits), torch.sigmoid(-logits)  # the second loses nothing where the first is near 1
    return -torch.where(logits[1:] < 0, left.diff(), -right.diff()).log()


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("ln_scale", LN_SCALES)
def test_discretised_logistic_is_differences_of_the_distribution_function(location: float, ln_scale: float) -> None:
    nll = DiscretisedLogistic().nll(maps_of(location, ln_scale, (1, 256)), LEVELS)
    assert nll.dtype == torch.float32 and nll.min() >= 0
    assert float(torch.exp(-nll[0, 0, 0].double()).sum()) == pytest.approx(1, abs=2e-5)
    expected = brute_force(location, ln_scale, -7.0)
    shown = expected < 600  # fp64 differences underflow beyond
    torch.testing.assert_close(nll[0, 0, 0].double()[shown], expected[shown], rtol=1e-5, atol=2e-5)
    assert nll.isfinite().all()


def test_discretised_logistic_ends_own_everything_beyond() -> None:
    for location, byte in ((-30.0, 0), (30.0, 255)):
        nll = DiscretisedLogistic().nll(maps_of(location, -3.0, (1, 256)), LEVELS)[0, 0, 0]
        assert float(nll[byte]) == 0 and float(nll.min()) == 0 and int(nll.argmin()) == byte
        assert float(nll[128]) > 500
    middle = DiscretisedLogistic().nll(maps_of(float(128 / 127.5 - 1), -50.0, (1, 256)), LEVELS)[0, 0, 0]
    assert math.exp(-float(middle[128])) == pytest.approx(math.tanh(math.exp(7) / 255 / 2), abs=1e-4)  # "0.97"


def test_discretised_logistic_gradients() -> None:
    maps = torch.tensor([0.3, -0.2, 1.1, -3.0, -30.0, 2.0]).view(1, 6, 1, 1).expand(1, 6, 1, 256)
    maps = maps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(DiscretisedLogistic().nll(maps, LEVELS).sum(), maps)
    assert gradient.isfinite().all() and gradient.ne(0).all(dim=3)[0, [0, 2, 3, 5]].all()
    for channel in (0, 2):
        location, ln_scale = (float(maps[0, channel + offset, 0, 0].detach()) for offset in (0, 3))
        h = 1e-5
        by_location = (brute_force(location + h, ln_scale, -7) - brute_force(location - h, ln_scale, -7)) / (2 * h)
        by_scale = (brute_force(location, ln_scale + h, -7) - brute_force(location, ln_scale - h, -7)) / (2 * h)
        torch.testing.assert_close(gradient[0, channel, 0].double(), by_location, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(gradient[0, channel + 3, 0].double(), by_scale, rtol=1e-3, atol=1e-3)


def test_which_likelihoods_count_bits() -> None:
    assert Bernoulli().discrete and DiscretisedLogistic().discrete
    assert not Gaussian(0.1).discrete and not LogitLaplace().discrete


def test_phi_is_the_papers_map() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    expected = (1 - 2 * 0.1) / 255 * torch.arange(256, dtype=torch.float64) + 0.1
    torch.testing.assert_close(phi(levels).double(), expected, rtol=0, atol=1e-6)
    assert levels.tolist() == list(range(256)), "the input must stay as it was"
    floats = torch.arange(256.0)
    phi(floats)
    assert floats.tolist() == list(range(256)), "the input must stay as it was"


def test_inverses() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(phi(levels)), levels)
    torch.testing.assert_close(phi_inverse(phi(levels)), levels.float(), rtol=0, atol=1e-3)
    assert phi_inverse(torch.tensor([0.0, 1.0])).tolist() == [0, 255]
    locations = {likelihood: likelihood.location(phi(levels)) for likelihood in (LogitLaplace(), Gaussian(0.1))}
    locations[Gaussian(None)] = Gaussian(None).location(phi(levels))
    locations[Bernoulli()], locations[DiscretisedLogistic()] = torch.logit(levels / 255), levels / 127.5 - 1
    for likelihood, location in locations.items():
        maps = location.view(1, 1, 16, 16).expand(1, likelihood.channels, 16, 16)
        assert torch.equal(to_bytes(likelihood.mean(maps))[0, 0].flatten(), levels)
