"""Likelihoods of pixels and the map between bytes and the open unit interval (arXiv 2102.12092, Sec. 2.1, App. A.3).

A decoder returns `maps` [B, channels, H, W]; a likelihood reads them. Everything here computes in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

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
    """What a decoder's maps say about a picture."""

    @property
    def channels(self) -> int:
        """Maps per picture; the first three are the location of R, G, B."""
        ...

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        """maps [B, channels, H, W], target = phi(image) [B, 3, H, W] -> nats per value [B, 3, H, W]."""
        ...

    def mean(self, maps: Tensor) -> Tensor:
        """The picture that the maps stand for, in phi space [B, 3, H, W]."""
        ...

    def location(self, target: Tensor) -> Tensor:
        """The location maps of which `mean` is `target`."""
        ...


@dataclass(frozen=True)
class LogitLaplace:
    """f(x | mu, b) = 1 / (2 b x (1 - x)) exp(-|logit x - mu| / b) on (0, 1); maps are mu (3), then ln b (3).

    With `ln_b_floor` the scale cannot fall below exp(ln_b_floor): b = exp(map) + exp(floor). Without it b follows the
    easiest pixels (flat background), whose likelihood then outweighs everything else in a picture.
    """

    ln_b_floor: float | None = None
    channels: ClassVar[int] = 6

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        mu, ln_b = maps.float().chunk(2, dim=1)
        if self.ln_b_floor is not None:
            ln_b = torch.logaddexp(ln_b, ln_b.new_full((), self.ln_b_floor))
        density = math.log(2) + torch.log(target * (1 - target))
        return (torch.logit(target) - mu).abs() * torch.exp(-ln_b) + ln_b + density

    def mean(self, maps: Tensor) -> Tensor:
        return torch.sigmoid(maps[:, :3].float())

    def location(self, target: Tensor) -> Tensor:
        return torch.logit(target)


@dataclass(frozen=True)
class Gaussian:
    """Normal with mean = the three maps and a fixed standard deviation in phi space: squared error, in nats."""

    std: float
    channels: ClassVar[int] = 3

    def nll(self, maps: Tensor, target: Tensor) -> Tensor:
        return (target - maps.float()).square() / (2 * self.std**2) + math.log(self.std * math.sqrt(2 * math.pi))

    def mean(self, maps: Tensor) -> Tensor:
        return maps.float()

    def location(self, target: Tensor) -> Tensor:
        return target
