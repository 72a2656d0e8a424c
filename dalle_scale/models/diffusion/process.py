"""The Gaussian diffusion of DDPM (arXiv 2006.11239): schedules, the noisy map at any time, the posterior, what nets may
predict, and the variational bound; the learned variance is that of arXiv 2102.09672.

Times are 0 .. T - 1; the papers' t is one more. Everything about a schedule is computed once in float64, and a factor
is rounded when it meets a map. Maps x0 of images span -1 .. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dalle_scale.nn.counter_rng import normal_noise, uniform_noise

Schedule: TypeAlias = Literal["linear", "cosine"]
Target: TypeAlias = Literal["eps", "x0", "v"]
Variance: TypeAlias = Literal["fixed_small", "fixed_large", "learned"]


def betas_of(schedule: Schedule, steps: int) -> Tensor:
    """Variance that each step adds, float64 [steps] on the CPU, whatever the default device.

    linear: 1e-4 .. 0.02 at 1000 steps (arXiv 2006.11239, Sec. 4); at other lengths times 1000 / steps, which keeps the
    noise at the end (arXiv 2102.09672, Sec. 3.2, and its code); 21 steps or more. cosine: alphas_cumprod =
    cos^2((t / T + 0.008) / 1.008 pi / 2) with beta at most 0.999 (arXiv 2102.09672, Eq. 17).
    """
    if schedule == "linear":
        assert steps > 20, "beta would reach 1"
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64, device="cpu")
    grid = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    level = torch.cos((grid + 0.008) / 1.008 * (math.pi / 2)).square()
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


def to_map(images: Tensor) -> Tensor:
    """uint8 0..255 -> fp32 -1 .. 1, same shape."""
    return images.float() / 127.5 - 1


def to_bytes(maps: Tensor) -> Tensor:
    """The inverse of `to_map`: rounded to nearest, what lies beyond cut to 0 or 255."""
    return ((maps.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Diffusion:
    """The process that a schedule describes.

    Attributes:
        betas, alphas_cumprod: float64 [T] on the CPU.
        posterior_variance: of q(x_{t-1} | x_t, x0), float64 [T]; 0 at time 0.
    """

    def __init__(self, betas: Tensor) -> None:
        """betas: float64 [T], in (0, 1), T >= 2."""
        assert betas.dtype == torch.float64 and len(betas) > 1 and betas.min() > 0 and betas.max() < 1
        self.betas, self.alphas_cumprod = betas, torch.cumprod(1 - betas, dim=0)
        noise_share = 1 - self.alphas_cumprod
        before = torch.cat([torch.ones_like(betas[:1]), self.alphas_cumprod[:-1]])
        self.posterior_variance = betas * (1 - before) / noise_share
        # Time 0 takes the value of time 1, since its own variance is 0 (as in the code of arXiv 2006.11239)
        second = self.posterior_variance[1:2].log()
        self._factors = {
            "signal": self.alphas_cumprod.sqrt(),
            "noise": noise_share.sqrt(),
            "posterior_data": betas * before.sqrt() / noise_share,
            "log_small": torch.cat([second, self.posterior_variance[1:].log()]),
            "log_large": torch.cat([second, betas[1:].log()]),
            "log_beta": betas.log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def factor(self, name: str, times: Tensor, like: Tensor) -> Tensor:
        """A factor at each sample's time int64 [B]: [B, 1, ...], for maps `like` [B, ...] and of their type."""
        if times.device not in self._on_device:
            self._on_device[times.device] = {key: row.to(times.device) for key, row in self._factors.items()}
        row = self._on_device[times.device][name]
        return row[times].to(like.dtype).view(-1, *[1] * (like.ndim - 1))

    def noisy(self, x0: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x0) (Eq. 4): maps and standard normal noise [B, ...] -> [B, ...]."""
        return self.factor("signal", times, x0) * x0 + self.factor("noise", times, x0) * noise

    def target(self, kind: Target, x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Target of a net of this kind; v = signal * noise - noise level * x0 (arXiv 2202.00512, Sec. 4)."""
        if kind == "v":
            return self.factor("signal", times, x0) * noise - self.factor("noise", times, x0) * x0
        return noise if kind == "eps" else x0

    def x0(self, kind: Target, predicted: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The map that a prediction at x means."""
        if kind == "x0":
            return predicted
        signal, level = self.factor("signal", times, x), self.factor("noise", times, x)
        return (x - level * predicted) / signal if kind == "eps" else signal * x - level * predicted

    def log_variance(self, kind: Variance, times: Tensor, like: Tensor, share: Tensor | None = None) -> Tensor:
        """ln of the variance of p(x_{t-1} | x_t): [B, 1, ...], or the shape of `like` [B, ...] if learned.

        fixed_small: the posterior's; fixed_large: beta (arXiv 2006.11239, Sec. 3.2; at time 0 both are the posterior's
        at time 1). learned: `share` of ln beta, and of ln of the posterior's the rest (arXiv 2102.09672, Eq. 15).
        """
        small = self.factor("log_small", times, like)
        if kind != "learned":
            return small if kind == "fixed_small" else self.factor("log_large", times, like)
        assert share is not None
        return small + share * (self.factor("log_beta", times, like) - small)

    def prior_bits(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, 1)) in bits per value, the term L_T of the bound (Eq. 5): [B, ...] -> [B]."""
        share = float(self.alphas_cumprod[-1])
        nats = 0.5 * (share * x0.square() - share - math.log1p(-share))
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def bound_bits(
        self, images: Tensor | None, x0: Tensor, x0_predicted: Tensor, log_variance: Tensor, times: Tensor
    ) -> Tensor:
        """A term of the bound in bits per value, fp32 [B] (Eq. 5): at time 0 the cost of the bytes given x_1 (Eq. 13),
        at others KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), whose means are apart by a multiple of how far the
        predicted map is from x0.

        Args:
            images: uint8 [B, ...]; None for latents, where time 0 counts as if its posterior were as wide as that of
                time 1.
            x0: maps [B, ...].
            x0_predicted: from x_t.
            log_variance: of p, fp32, broadcast to maps.
            times: int64 [B].
        """
        apart = self.factor("posterior_data", times, x0) * (x0 - x0_predicted)
        narrower = self.factor("log_small", times, x0) - log_variance
        # expm1(d) - d and not exp(d) - 1 - d: the variances are nearly equal at most times
        nats = 0.5 * (torch.expm1(narrower) - narrower + apart.square() * torch.exp(-log_variance))
        if images is not None:
            first = (times == 0).view(-1, *[1] * (x0.ndim - 1))
            # what is not selected must be harmless too: an infinite slope times 0 would not be a number
            mean, width = torch.where(first, x0_predicted, x0), torch.where(first, log_variance, 0.0)
            nats = torch.where(first, byte_nats(images, mean, width), nats)
        return nats.flatten(1).mean(dim=1) / math.log(2)


def rate_and_distortion(
    diffusion: Diffusion,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    images: Tensor,
    seeds: Tensor,
    steps: int = 0,
    watch: Callable[[range], Iterable[int]] = iter,
) -> tuple[Tensor, Tensor]:
    """The variational bound of images (Eq. 5) in bits per value, fp64 [B] each: L_T and the times above 0; time 0.

    Args:
        predict: (noisy maps [B, ...], times int64 [B]) -> predicted x0, log-variance of p.
        images: uint8 [B, ...].
        seeds: int64 [B], source of the noise.
        steps: 0 = all times; k > 0 = k of the times above 0, without bias: one from each k-th of the range of log t,
            each over k times its probability. The terms fall off about as 1 / t, as the probabilities do.
        watch: passes the times on, for a progress bar.
    """
    x0, last = to_map(images).contiguous(), len(diffusion)

    def term(times: Tensor, number: int) -> Tensor:
        x = diffusion.noisy(x0, times, normal_noise(seeds, number, x0[0].numel()).view_as(x0))
        return diffusion.bound_bits(images, x0, *predict(x, times), times).double()

    rate = diffusion.prior_bits(x0).double()
    if steps == 0:
        for time in watch(range(1, last)):
            rate += term(torch.full_like(seeds, time), time)
    else:
        # floor(T^u), u uniform, is t with probability log_T(1 + 1 / t)
        u = (torch.arange(steps, device=seeds.device) + uniform_noise(seeds, last, steps).double()) / steps
        times = (last**u).long().clamp(1, last - 1)
        scale = math.log(last) / (steps * torch.log1p(1 / times.double()))
        for index in range(steps):
            rate += scale[:, index] * term(times[:, index], index + 1)
    return rate, term(torch.zeros_like(seeds), 0)


def byte_nats(images: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln of the probability that a normal variable falls into the interval of a byte (arXiv 2006.11239, Eq. 13):
    uint8, maps, and maps or what broadcasts to them -> fp32, same shape. Bytes lie 2 / 255 apart; 0 and 255 own all
    beyond, so that the 256 probabilities sum to 1."""
    level, inverse_std = images.float(), torch.exp(-0.5 * log_variance)
    # neighbours compute the edge between them from the same number, so that nothing falls between two intervals
    below = ((2 * level - 256) / 255 - mean) * inverse_std
    above = ((2 * level - 254) / 255 - mean) * inverse_std
    # above the mean, take the mirror image: the distribution function near 1 has no digits left to subtract
    mirrored = below + above > 0
    low, high = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(log_low - log_high))
    open_below, open_above = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return -torch.where(level == 0, open_below, torch.where(level == 255, open_above, inside))
