"""Residual encoder and decoder of the VAE, and the diagonal Gaussian between them (arXiv 1312.6114, App. B and C.2).

The latent is [B, C, side, side]: a map that the decoder reads position by position, or a vector of C numbers (side 1)
that a convolution as large as the trunk's last grid makes of all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_scale.models.dvae import bottlenecks
from dalle_scale.nn.blocks import conv, initialized


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_variance)), independent in every dimension; both fp32 [B, C, h, w]."""

    mean: Tensor
    log_variance: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """Standard normal noise, any shape of the right size -> z = mean + std * noise, [B, C, h, w] (Sec. 3)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.view_as(self.mean)

    def kl(self) -> Tensor:
        """KL to N(0, 1) in nats, of each dimension [B, C, h, w] (App. B)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of z [B, C, h, w] in nats, fp32 [B]."""
        squares = (z - self.mean).square() * torch.exp(-self.log_variance)
        return -0.5 * (squares + self.log_variance + math.log(2 * math.pi)).sum(dim=(1, 2, 3))


class Encoder(nn.Module):
    """Image in phi space [B, 3, S, S] -> mean and log-variance of the latent, two fp32 [B, channels, side, side].

    Args:
        widths: channels of each group of residual blocks; between two groups the resolution halves.
        blocks: residual blocks a group.
        channels: C.
        kernel: side of what becomes one position of the latent: 1 (a map), or all of the last grid (a vector).
    """

    def __init__(self, widths: Sequence[int], blocks: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.input = conv(3, widths[0], 3)
        layers: list[nn.Module] = []
        gain = 1 / math.sqrt(len(widths) * blocks)  # the sum of all branches starts about as large as one
        for group, width in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if group else []
            layers += bottlenecks(widths[max(group - 1, 0)], width, blocks, (3, 3, 3, 1), gain)
        self.trunk = nn.Sequential(*layers)
        output = nn.Conv2d(widths[-1], 2 * channels, kernel)
        self.output = initialized(output, std=1 / math.sqrt(widths[-1] * kernel**2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(self.input(x.to(self.input.weight.dtype)))
        mean, log_variance = self.output(torch.relu(x)).float().chunk(2, dim=1)
        return mean, log_variance


class Decoder(nn.Module):
    """Latent [B, C, side, side] -> maps [B, maps, S, S]; the encoder's arguments, built in reverse."""

    def __init__(self, widths: Sequence[int], blocks: int, channels: int, kernel: int, maps: int) -> None:
        super().__init__()
        self.input = initialized(nn.ConvTranspose2d(channels, widths[-1], kernel), std=1 / math.sqrt(channels))
        layers: list[nn.Module] = []
        gain = 1 / math.sqrt(len(widths) * blocks)
        for group in reversed(range(len(widths))):
            before = widths[min(group + 1, len(widths) - 1)]
            layers += bottlenecks(before, widths[group], blocks, (1, 3, 3, 3), gain)
            layers += [nn.Upsample(scale_factor=2, mode="nearest")] if group else []
        self.trunk = nn.Sequential(*layers)
        self.output = conv(widths[0], maps, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.trunk(self.input(z.to(self.input.weight.dtype)))
        maps: Tensor = self.output(torch.relu(x))
        return maps
