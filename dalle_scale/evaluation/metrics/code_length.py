"""Cost of images in bits, given their reconstructions.

Each byte is coded with a distribution around the decoded byte that has one scale for all images. This is a code of
two parts: which of FAMILIES and SCALES, then the bytes with it. The best of them for the very images may be taken,
since its name is paid for: the sum is still the length of a code that one could write and read back.

All of it follows from how often each pair (decoded byte, byte) occurs, which are integers: exact, and the same however
the images are shared out and in whatever order they are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_scale.nn.likelihoods import DiscretisedLogistic, phi

SCALES = tuple(2.0 ** (-3 + 9 * index / 63) for index in range(64))  # in bytes, 1/8 .. 64, each 1.104 times the last


@dataclass(frozen=True)
class PixelBits:
    """The cheapest code of all images together."""

    bits: float  # of all of them, and of the choice
    family: str
    scale: float  # in bytes

    def __str__(self) -> str:
        return f"{self.family} {self.scale:.3g}"


def count_pairs(decoded: Tensor, images: Tensor) -> Tensor:
    """Counts of byte x where m was decoded: uint8 twice, same shape -> int64 [256, 256] (m, x) on the CPU."""
    pairs = decoded.int() * 256 + images.int()
    return torch.bincount(pairs.flatten(), minlength=256 * 256).view(256, 256).cpu()


def cheapest(pairs: Tensor) -> PixelBits:
    """The shortest code among FAMILIES and SCALES of what `count_pairs` has counted, int64 [256, 256].

    Within the range of SCALES the best one of all is no further than half a step away. That costs less than 0.004 bits
    a byte: by ln(scale), the second derivative of the length is 2 nats at the best scale of a normal distribution.
    """
    choice_bits = math.log2(len(FAMILIES) * len(SCALES))
    counts = pairs.double()
    tries = []
    for family, nats in FAMILIES.items():
        for scale in SCALES:
            bits = float((counts * nats(scale)).sum()) / math.log(2) + choice_bits
            tries.append(PixelBits(bits, family, scale))
    return min(tries, key=lambda tried: tried.bits)


def logistic_nats(scale: float) -> Tensor:
    """-ln of the probability of byte x around byte m, fp64 [256, 256] (m, x): `DiscretisedLogistic` without a floor."""
    levels = torch.arange(256)
    location = (levels[:, None] / 127.5 - 1).expand(1, 3, 256, 256)
    ln_scale = torch.full_like(location, math.log(scale * 2 / 255))
    target = phi(levels).expand(1, 3, 256, 256)
    likelihood = DiscretisedLogistic(ln_scale_floor=-math.inf)
    return likelihood.nll(torch.cat([location, ln_scale], dim=1), target)[0, 0].double()


def gaussian_nats(scale: float) -> Tensor:
    """The same for a normal variable with this standard deviation: the probability that it falls within half a byte of
    x; bytes 0 and 255 own all beyond."""
    levels = torch.arange(256, dtype=torch.float64)
    below = (levels - 0.5 - levels[:, None]) / scale
    above = (levels + 0.5 - levels[:, None]) / scale
    below[:, 0], above[:, 255] = -math.inf, math.inf
    # above the mean, take the mirror image: the distribution function near 1 has no digits left to subtract
    mirrored = below + above > 0
    low, high = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    nats: Tensor = -(log_high + torch.log(-torch.expm1(log_low - log_high)))
    return nats


FAMILIES: dict[str, Callable[[float], Tensor]] = {"logistic": logistic_nats, "normal": gaussian_nats}
