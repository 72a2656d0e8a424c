"""The UNet of DDPM (arXiv 2006.11239, Sec. 4 and App. B, and its published code), with a caption if wanted.

Residual blocks at every side, attention at some, skips from each part of the way down to its mirror image on the way
up. The time is a sinusoidal embedding through two layers, then one layer for each residual block; all of these
together are one matrix product.

A caption becomes one vector (models/pixelsnail/model.py, CaptionMean) that is added to the embedded time; the empty
caption adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.pixelsnail.model import CaptionMean
from dalle_scale.models.unet.layers import (
    Attention,
    Conv3x3,
    Double,
    Dropout,
    Halve,
    NormSwish,
    ResBlock,
    laid_out,
    linear,
    norm_groups,
)


def time_embedding(times: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of the time by frequencies from 1 to 1 / 10,000: [B] -> fp32 [B, width], width even."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=times.device) * (-math.log(10_000) / (half - 1)))
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNet(nn.Module):
    """A noisy map and its time -> maps of the same size."""

    def __init__(
        self,
        *,
        n_in: int,
        n_out: int,
        size: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention_sizes: Collection[int],
        dropout: float = 0.0,
        text_vocab: int = 0,
        text_length: int = 0,
    ) -> None:
        """
        Args:
            size: side of the maps; a multiple of 2^(number of multipliers - 1).
            width: channels at full size, a multiple of 4, above 128 of 32 (see `norm_groups`).
            multipliers: channels at each side, in `width`; the side halves from one to the next.
            blocks: residual blocks at each side on the way down; one more on the way up.
            attention_sizes: sides at which attention follows each residual block; the middle has it always.
            dropout: share left out inside the residual blocks while training.
            text_length: tokens of a caption; 0 = none.
        """
        super().__init__()
        self.width, self.size, self.dropout, self._groups = width, size, dropout, norm_groups(width)
        assert width % self._groups == 0
        self.time1, self.time2 = linear(width, 4 * width), linear(4 * width, 4 * width)
        self.caption = CaptionMean(text_vocab, text_length, 4 * width) if text_length else None
        self.input = Conv3x3(n_in, width)
        self._widths: list[int] = []  # n_out of each residual block
        skips, channels = [width], width
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            attends = size >> level in attention_sizes
            for _ in range(blocks):
                self.down.append(self._unit(channels, multiplier * width, attends))
                channels = multiplier * width
                skips.append(channels)
            if level < len(multipliers) - 1:
                self.down.append(Halve(channels))
                skips.append(channels)
        self.middle.extend([self._unit(channels, channels, attends=True), self._unit(channels, channels, False)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(self._unit(channels + skips.pop(), multiplier * width, size >> level in attention_sizes))
                channels = multiplier * width
            if level:
                self.up.append(Double(channels, channels))
        self.time_of_block = linear(4 * width, *self._widths)
        self.norm = NormSwish(channels, self._groups)
        self.output = Conv3x3(channels, n_out, zero=True)

    def _unit(self, n_in: int, n_out: int, attends: bool) -> nn.ModuleList:
        """A residual block, and the attention after it where there is one."""
        block = ResBlock(len(self._widths), n_in, n_out, self._groups)
        self._widths.append(n_out)
        return nn.ModuleList([block, Attention(n_out, self._groups)] if attends else [block])

    def forward(
        self, x: Tensor, times: Tensor, text: Tensor | None = None, seeds: Tensor | None = None, step: int = 0
    ) -> Tensor:
        """
        Args:
            x: [B, n_in, size, size].
            times: int64 [B].
            text: int64 [B, T], where the net takes captions; empty places hold `text_vocab` + place.
            seeds: int64 [B], source of the dropout; None = no dropout. In training mode only.
            step: number of the noise that the dropout uses.

        Returns:
            fp32 [B, n_out, size, size].
        """
        x = laid_out(x.to(self.input.weight.dtype))
        dropout = None
        if seeds is not None and self.training and self.dropout:
            largest = max(self._widths) * self.size**2  # no map is larger
            dropout = Dropout.of(self.dropout, seeds, step, len(self._widths), largest)
        shifts = torch.split(self._time(times, text), self._widths, dim=1)

        def unit(layers: nn.ModuleList, x: Tensor) -> Tensor:
            block, *attention = layers
            assert isinstance(block, ResBlock)
            x = block(x, shifts[block.number], dropout)
            for layer in attention:
                x = layer(x)
            return x

        x = self.input(x)
        skips = [x]
        for layer in self.down:
            x = unit(layer, x) if isinstance(layer, nn.ModuleList) else layer(x)
            skips.append(x)
        for layer in self.middle:
            assert isinstance(layer, nn.ModuleList)
            x = unit(layer, x)
        for layer in self.up:
            x = unit(layer, torch.cat([x, skips.pop()], dim=1)) if isinstance(layer, nn.ModuleList) else layer(x)
        out: Tensor = self.output(self.norm(x))
        return out.float()

    def _time(self, times: Tensor, text: Tensor | None) -> Tensor:
        """Time term of each residual block, side by side: [B, sum of their widths]."""
        embedded = time_embedding(times, self.width).to(self.input.weight.dtype)
        embedded = self.time2(F.silu(self.time1(embedded)))
        if self.caption is not None:
            assert text is not None
            embedded = embedded + self.caption(text)
        shifts: Tensor = self.time_of_block(F.silu(embedded))
        return shifts
