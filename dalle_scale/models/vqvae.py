"""Convolutional encoder and decoder of VQ-VAE (arXiv 1711.00937, Sec. 4.1) and VQ-VAE-2 (arXiv 1906.00446, App. A).

Each strided 4x4 convolution halves a side, each transposed one doubles it; between them and the codes lie residual
blocks of ReLU, 3x3, ReLU, 1x1. Pixels span -1 .. 1 here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_scale.nn.blocks import run


def to_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 -> fp32 in [-1, 1], same shape."""
    return images.float().mul_(2 / 255).sub_(1)


def to_levels(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels` on floats: fp32 clipped to 0..255 and not rounded."""
    return pixels.float().add(1).mul_(255 / 2).clamp_(0, 255)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels -> uint8, rounded to nearest; `to_bytes(to_pixels(images))` gives the images back."""
    return to_levels(pixels).round_().to(torch.uint8)


class Residual(nn.Module):
    """x + 1x1 convolution of ReLU of 3x3 convolution, `hidden` wide, of ReLU of x: [B, width, h, w], same shape."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, width, 1)
        )
        self.activation_checkpointing = False  # set from outside: recompute the branch in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        return x + run(self.branch, x, recompute=self.activation_checkpointing)


class Encoder(nn.Module):
    """[B, channels, S, S] -> [B, width, S / downsampling, S / downsampling], in the dtype of the weights.

    Args:
        channels: of the input.
        width: channels of everything after the input but the inside of residual blocks.
        hidden: width inside the residual blocks.
        blocks: residual blocks.
        downsampling: a power of two, 2 or more.
        mixing: whether a 3x3 convolution precedes the residual blocks, as in VQ-VAE-2.
    """

    def __init__(self, channels: int, width: int, hidden: int, blocks: int, downsampling: int, mixing: bool) -> None:
        super().__init__()
        halvings = downsampling.bit_length() - 1
        layers: list[nn.Module] = []
        for index in range(halvings):
            layers += [nn.Conv2d(width if index else channels, width, 4, stride=2, padding=1), nn.ReLU()]
        layers = layers if mixing else layers[:-1]  # a residual block begins with its own ReLU
        layers += [nn.Conv2d(width, width, 3, padding=1)] if mixing else []
        layers += [Residual(width, hidden) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x.to(next(self.parameters()).dtype))
        return features


class Decoder(nn.Module):
    """[B, channels, h, w] -> [B, n_out, h upsampling, w upsampling], the mirror of `Encoder`; a 3x3 convolution takes
    the channels of the codes to `width`."""

    def __init__(self, channels: int, width: int, hidden: int, blocks: int, upsampling: int, n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        layers += [Residual(width, hidden) for _ in range(blocks)]
        doublings = upsampling.bit_length() - 1
        for index in range(doublings):
            after = n_out if index == doublings - 1 else width
            layers += [nn.ReLU(), nn.ConvTranspose2d(width, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layers(x.to(next(self.parameters()).dtype))
        return maps
