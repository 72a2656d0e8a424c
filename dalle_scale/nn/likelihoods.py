"""Likelihoods of pixels and the map between bytes and the open unit interval (arXiv 2102.12092, Sec. 2.1, App. A.3).

A decoder returns `maps` [B, channels, H, W]; a likelihood reads them. Everything here computes in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

PHI_EPS = 0.1  # keeps phi(x) away from 0 and 1, where the logit is infinite


def phi(images: Tensor) -> Tensor:
    """uint8 0..255 (or floats of that range) -> fp32 in [PHI_EPS, 1 - PHI_EPS], same shape."""
    return (images.float() * ((1 - 2 * PHI_EPS) / 255)).add_(PHI_EPS)


def phi_inverse(values: Tensor) -> Tensor:
    """The inverse of `phi` on floats, clipped to 0..255 and not rounded."""
    return ((values.float() - PHI_EPS) * (255 / (1 - 2 * PHI_EPS))).clamp(0, 255)


def to_bytes(values: Tensor) -> Tensor:
    """phi space -> uint8, rounded to nearest; `to_bytes(phi(images))` gives the images back."""
    return phi_inverse(values).round_().to(torch.uint8)


class Likelihood(Protocol):
    """Distribution of an image given a decoder's maps."""

    @property
    def discrete(self) -> bool:
        """Whether exp(-nll) is the probability of a byte or bit, so that bits per value mean a file's length; if not,
        it is a density in phi space."""
        ...

    @property
    def channels(self) -> int:
        """Maps per image; the first three are the location of R, G, B."""
        ...

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        """maps [B, channels, H, W], target = phi(image) [B, 3, H, W] -> nats per value [B, 3, H, W]."""
        ...

    def mean(self, maps: Tensor) -> Tensor:
        """The image that the maps stand for, in phi space [B, 3, H, W]."""
        ...


@dataclass(frozen=True)
class LogitLaplace:
    """f(x | mu, b) = 1 / (2 b x (1 - x)) exp(-|logit x - mu| / b) on (0, 1); maps are mu (3), then ln b (3).

    With `ln_b_floor` the scale cannot fall below exp(ln_b_floor): b = exp(map) + exp(floor). Without it b follows the
    easiest pixels (flat background), whose likelihood then outweighs everything else in an image.
    """

    ln_b_floor: float | None = None
    discrete: ClassVar[bool] = False
    channels: ClassVar[int] = 6

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        mu, ln_b = maps.float().chunk(2, dim=1)
        ln_b = _bounded(ln_b, self.ln_b_floor)
        density = math.log(2) + torch.log(target * (1 - target))
        return (torch.logit(target) - mu).abs() * torch.exp(-ln_b) + ln_b + density

    def mean(self, maps: Tensor) -> Tensor:
        return torch.sigmoid(maps[:, :3].float())

    def location(self, target: Tensor) -> Tensor:
        """The location maps of which `mean` is `target`."""
        return torch.logit(target)


@dataclass(frozen=True)
class Gaussian:
    """Normal in phi space; maps are the mean (3) and, with `std` None, ln std (3).

    A fixed `std` makes it squared error, in nats. A learned one is bounded below by exp(ln_std_floor), as in
    `LogitLaplace`: std = exp(map) + exp(floor).
    """

    std: float | None
    ln_std_floor: float | None = None
    discrete: ClassVar[bool] = False

    @property
    def channels(self) -> int:
        return 6 if self.std is None else 3

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        error = target - maps[:, :3].float()
        if self.std is not None:
            return error.square() / (2 * self.std**2) + math.log(self.std * math.sqrt(2 * math.pi))
        ln_std = _bounded(maps[:, 3:].float(), self.ln_std_floor)
        return 0.5 * (error * torch.exp(-ln_std)).square() + ln_std + 0.5 * math.log(2 * math.pi)

    def mean(self, maps: Tensor) -> Tensor:
        return maps[:, :3].float()

    def location(self, target: Tensor) -> Tensor:
        """As `LogitLaplace.location`."""
        return target


@dataclass(frozen=True)
class Bernoulli:
    """Each value is a bit that is on with probability sigmoid(map); for black and white images.

    A byte x between 0 and 255 counts as a bit that is on with probability x / 255: the mean nll over such bits. A bound
    on the likelihood stays one (the mean over bits of a log-mean-exp is not less than that of the means), namely of
    images sampled this way.
    """

    discrete: ClassVar[bool] = True
    channels: ClassVar[int] = 3

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(maps.float(), phi_inverse(target) / 255, reduction="none")

    def mean(self, maps: Tensor) -> Tensor:
        return phi(torch.sigmoid(maps.float()) * 255)


@dataclass(frozen=True)
class DiscretisedLogistic:
    """The probability that a logistic variable falls into the interval of a byte (arXiv 1701.05517, Sec. 2.1, with one
    component).

    Bytes 0..255 lie at -1..1, 2 / 255 apart, and those at the ends own all beyond: the 256 probabilities sum to 1.
    Maps are the location (3) and ln of the scale (3) in these units. The scale cannot fall below exp(ln_scale_floor):
    s = exp(map) + exp(floor); at the default a byte in the middle of its interval has probability 0.97.
    `target` must be phi of bytes.
    """

    ln_scale_floor: float = -7.0
    discrete: ClassVar[bool] = True
    channels: ClassVar[int] = 6

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        location, ln_scale = maps.float().chunk(2, dim=1)
        inverse_scale = torch.exp(-_bounded(ln_scale, self.ln_scale_floor))
        level = phi_inverse(target).round()
        # neighbours compute the edge between them from the same number, so that nothing falls between two intervals
        below = (_edge(level) - location) * inverse_scale
        above = (_edge(level + 1) - location) * inverse_scale
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(-(b - a))): no difference of close numbers
        width = torch.log(-torch.expm1(inverse_scale * (-2 / 255)))
        first, last = level == 0, level == 255
        log_p = torch.where(last, 0.0, F.logsigmoid(above)) + torch.where(first, 0.0, F.logsigmoid(-below))
        return -(log_p + torch.where(first | last, 0.0, width))

    def mean(self, maps: Tensor) -> Tensor:
        """The location, which lies outside the bytes where an end byte is all but certain."""
        return phi((maps[:, :3].float() + 1) * 127.5)


def _edge(level: Tensor) -> Tensor:
    """Lower end of the interval of a byte in -1..1."""
    return (2 * level - 256) / 255


def _bounded(ln_scale: Tensor, floor: float | None) -> Tensor:
    """ln(exp(ln_scale) + exp(floor)): a floor that keeps gradients."""
    return ln_scale if floor is None else torch.logaddexp(ln_scale, ln_scale.new_full((), floor))
