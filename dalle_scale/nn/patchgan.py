"""PatchGAN (Isola et al., arXiv 1611.07004, App. 6.1.2) as VQGAN uses it, its losses, and LeCam regularisation.

Normalisation is a GroupNorm, not the papers' BatchNorm. BatchNorm makes the verdict on an image depend on the others
in its batch, so on micro-batches and ranks; its statistics would be updated in the generator's turn too; and they are
buffers that ranks do not share. GroupNorm keeps each image to itself, and training and evaluation are the same. Its
statistics cover the whole image: a patch is judged on its scale there. With norm "none" a logit depends on its patch
alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale.nn.blocks import initialized
from dalle_scale.nn.half_on_cpu import GroupNorm
from dalle_scale.types import StrictModel

GanLoss = Literal["hinge", "non_saturating"]
_WIDEST = 8  # widths double up to this multiple of the first


class DiscriminatorConfig(StrictModel):
    """One PatchGAN."""

    width: int = Field(default=64, ge=1)  # channels after the first convolution
    layers: int = Field(default=3, ge=1)  # halvings; a logit sees 16, 34, 70, 142 pixels a side with 1, 2, 3, 4
    norm: Literal["group", "none"] = "group"
    norm_groups: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> DiscriminatorConfig:
        if self.norm == "group" and (self.width * 2) % self.norm_groups:
            raise ValueError(f"norm_groups {self.norm_groups} must divide 2 x width = {2 * self.width}")
        return self

    @property
    def smallest_pixels(self) -> int:
        """Smallest side of an image that gives a logit."""
        return int(3 * 2**self.layers)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: fp32 [B, 3, H, W] in -1 .. 1 -> logits fp32 [B, h, w], above 0 = real.

    4x4 convolutions: `layers` that halve the size, one more, and the head; leaky ReLU (0.2) between; weights from
    N(0, 0.02).
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**level, _WIDEST) for level in range(config.layers + 1)]
        layers: list[nn.Module] = [_conv(3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for level in range(1, config.layers + 1):
            layers.append(_conv(widths[level - 1], widths[level], stride=2 if level < config.layers else 1))
            layers += [GroupNorm(config.norm_groups, widths[level])] if config.norm == "group" else []
            layers.append(nn.LeakyReLU(0.2))
        self.trunk = nn.Sequential(*layers)
        self.head = _conv(widths[-1], 1, stride=1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images.to(self.head.weight.dtype)))
        return logits[:, 0].float()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """Loss of the discriminator, from logits [B, h, w] each -> fp32 [B].

    hinge: (max(0, 1 - real) + max(0, 1 + fake)) / 2 (arXiv 1705.02894). non_saturating: the binary cross entropies
    (-ln sigmoid(real) - ln(1 - sigmoid(fake))) / 2 (arXiv 1406.2661).
    """
    assert kind in ("hinge", "non_saturating")
    parts = F.relu(1 - real) + F.relu(1 + fake) if kind == "hinge" else F.softplus(-real) + F.softplus(fake)
    return parts.float().mean(dim=(1, 2)) / 2


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """Loss of the generator, from logits [B, h, w] of its images -> fp32 [B]: -fake with hinge,
    -ln sigmoid(fake) with non_saturating."""
    assert kind in ("hinge", "non_saturating")
    parts = -fake if kind == "hinge" else F.softplus(-fake)
    return parts.float().mean(dim=(1, 2))


def lecam(real: Tensor, fake: Tensor, real_average: Tensor, fake_average: Tensor) -> Tensor:
    """LeCam regularisation (Tseng et al., arXiv 2104.03310, eq. 5): logits [B, h, w] each -> fp32 [B].

    Pulls logits of real images to the moving average of those of made ones, and the reverse, so that the
    discriminator does not run away from the generator.
    """
    pull = (real - fake_average).square() + (fake - real_average).square()
    return pull.float().mean(dim=(1, 2))


class MovingAverage(nn.Module):
    """Exponential moving averages of `count` numbers: saved buffers, without the bias to 0 of their beginning."""

    sums: Tensor
    mass: Tensor

    def __init__(self, count: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("sums", torch.zeros(count))
        self.register_buffer("mass", torch.zeros(1))  # what `sums` would be, had all numbers been 1

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in the next values, fp32 [count], the same on all ranks."""
        self.sums.lerp_(values.to(self.sums), 1 - self.decay)
        self.mass.lerp_(torch.ones_like(self.mass), 1 - self.decay)

    def value(self) -> Tensor:
        """The averages, fp32 [count]; 0 before the first step."""
        return torch.where(self.mass > 0, self.sums / self.mass, self.sums)

    def started(self) -> Tensor:
        """Whether there was a step, fp32 [1]: 1 or 0."""
        return (self.mass > 0).float()


def _conv(n_in: int, n_out: int, stride: int) -> nn.Conv2d:
    """4x4 with padding 1; the bias stays where a norm follows, whose groups do not take out all of it."""
    return initialized(nn.Conv2d(n_in, n_out, 4, stride=stride, padding=1), std=0.02)
