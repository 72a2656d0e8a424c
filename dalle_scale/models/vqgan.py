"""Encoder and decoder of VQGAN (Esser et al., arXiv 2012.09841, App. B, table 7).

Residual blocks of GroupNorm, swish and 3x3 convolutions; the size halves by a strided convolution after every group but
the last, and doubles by nearest neighbours and a convolution; self-attention at the lowest resolution only, where it
is cheap. Everything about one image stays within it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale.nn.blocks import conv, run
from dalle_scale.nn.half_on_cpu import GroupNorm, attend_all


class Residual(nn.Module):
    """x + branch(x); the branch is twice norm, swish and 3x3 convolution. The skip is 1x1 where the width changes."""

    def __init__(self, n_in: int, n_out: int, groups: int) -> None:
        super().__init__()
        self.skip = nn.Identity() if n_in == n_out else conv(n_in, n_out, 1)
        self.branch = nn.Sequential(
            norm(n_in, groups), nn.SiLU(), conv(n_in, n_out, 3), norm(n_out, groups), nn.SiLU(), conv(n_out, n_out, 3)
        )
        self.activation_checkpointing = False  # set from outside: recompute the branch in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, h, w] -> [B, n_out, h, w]."""
        branch = run(self.branch, x, recompute=self.activation_checkpointing)
        total: Tensor = self.skip(x) + branch
        return total


class Attention(nn.Module):
    """x + attention over all positions, one head as wide as x: [B, C, h, w] -> the same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.qkv = conv(width, 3 * width, 1)
        self.output = conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)  # [B, h w, C] each
        seen = attend_all(query, key, value)  # the softmax is fp32 inside
        total: Tensor = x + self.output(seen.mT.reshape(x.shape))
        return total


class Down(nn.Module):
    """Halve the size: 3x3 convolution of stride 2, padded right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width, 3)
        self.conv.stride, self.conv.padding = (2, 2), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return made


class GanEncoder(nn.Module):
    """Images fp32 [B, 3, S, S] -> features [B, dim, h, h] with h = S / 2^(groups of blocks - 1).

    Args:
        widths: channels of each group of residual blocks; the paper's f16 model has 128, 128, 256, 256, 512.
        blocks: residual blocks a group.
        dim: of the features.
        groups: of the norms; divides all widths.
    """

    def __init__(self, widths: Sequence[int], blocks: int, dim: int, groups: int) -> None:
        super().__init__()
        self.input = conv(3, widths[0], 3)
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            lowest = level == len(widths) - 1
            layers += _level(widths[max(level - 1, 0)], width, blocks, groups, attends=lowest)
            layers += [] if lowest else [Down(width)]
        self.trunk = nn.Sequential(*layers, *_middle(widths[-1], groups))
        self.output = nn.Sequential(norm(widths[-1], groups), nn.SiLU(), conv(widths[-1], dim, 3), conv(dim, dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.output(self.trunk(self.input(images.to(self.input.weight.dtype))))
        return features


class GanDecoder(nn.Module):
    """Features [B, dim, h, h] -> images [B, 3, S, S] around -1 .. 1, and what its last convolution reads
    [B, widths[0], S, S]. One block a group more than the encoder; the same arguments."""

    def __init__(self, widths: Sequence[int], blocks: int, dim: int, groups: int) -> None:
        super().__init__()
        self.input = nn.Sequential(conv(dim, dim, 1), conv(dim, widths[-1], 3))
        layers: list[nn.Module] = _middle(widths[-1], groups)
        for level in reversed(range(len(widths))):
            lowest = level == len(widths) - 1
            before = widths[level] if lowest else widths[level + 1]
            layers += _level(before, widths[level], blocks + 1, groups, attends=lowest)
            if level > 0:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), conv(widths[level], widths[level], 3)]
        self.trunk = nn.Sequential(*layers, norm(widths[0], groups), nn.SiLU())
        self.output = conv(widths[0], 3, 3)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        last: Tensor = self.trunk(self.input(features.to(self.output.weight.dtype)))
        return self.output(last), last


def norm(width: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the paper's eps."""
    return GroupNorm(groups, width, eps=1e-6)


def _level(n_in: int, width: int, blocks: int, groups: int, attends: bool) -> list[nn.Module]:
    """Residual blocks, each followed by attention where the level `attends`."""
    layers: list[nn.Module] = []
    for index in range(blocks):
        layers.append(Residual(width if index else n_in, width, groups))
        layers += [Attention(width, groups)] if attends else []
    return layers


def _middle(width: int, groups: int) -> list[nn.Module]:
    """Layers next to the codes: a block, attention, a block."""
    return [Residual(width, width, groups), Attention(width, groups), Residual(width, width, groups)]
