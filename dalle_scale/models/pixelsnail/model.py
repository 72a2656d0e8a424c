"""PixelSNAIL: an autoregressive network over a square of codes (arXiv 1712.09763), as VQ-VAE-2 uses it for its priors
(arXiv 1906.00446, Sec. 3.2).

Code p of the raster is predicted from the codes before it, and from a condition: the codes of coarser squares, a
caption.

    codes -> embedding -> strictly causal convolution + position
          -> gated residual blocks of causal convolutions, attention after every few
          -> gated residual blocks of single pixels -> logits

A causal convolution sees `kernel // 2` rows above at its full width, and its own row up to itself. Stacked, these
never reach what lies above and far to the right: kernel // 2 columns a row is as far as they go. Attention does, and
the level above tells the rest.

Chosen here where papers differ or say nothing: LayerNorm over channels at the start of each block instead of weight
normalisation, whose start depends on data; learned row and column embeddings; multi-head attention with heads of
width / heads.

Sampling keeps a cache (`Decoding`): the last rows of every convolution's input, keys and values of all pixels. A pixel
then costs one column of work, and what the rows above add to a row is computed once for the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.dvae import Bottleneck, CodeHead
from dalle_scale.models.pixelsnail.layers import (
    Block,
    CausalAttention,
    CausalBlock,
    Decoding,
    PixelBlock,
    RowBuffer,
    embedding,
    linear,
    positions,
)
from dalle_scale.nn.blocks import run
from dalle_scale.nn.causal_conv import CausalConv


class UpperLevels(nn.Module):
    """The codes of all coarser squares as a condition: embedded, brought to the finest of their grids and summed, a
    stack of residual blocks there, then repeated onto this grid."""

    def __init__(self, vocab: int, grids: Sequence[int], grid: int, width: int, layers: int) -> None:
        super().__init__()
        self.grids, self.grid = tuple(grids), grid
        self.codes = nn.ModuleList(embedding(vocab, width) for _ in grids)
        self.blocks = nn.Sequential(*(Bottleneck(width, width, (3, 3), layers**-0.5) for _ in range(layers)))

    def forward(self, upper: Tensor) -> Tensor:
        """Codes int64 [B, sum of the grids squared], coarsest first, -> [B, grid, grid, C]."""
        parts = torch.split(upper, [grid**2 for grid in self.grids], dim=1)
        squares = []
        for grid, table, codes in zip(self.grids, self.codes, parts, strict=True):
            square = table(codes.reshape(-1, grid, grid)).permute(0, 3, 1, 2)
            squares.append(F.interpolate(square, size=self.grids[-1], mode="nearest"))
        x = torch.stack(squares).sum(dim=0)
        return F.interpolate(self.blocks(x), size=self.grid, mode="nearest").permute(0, 2, 3, 1)


class CaptionMean(nn.Module):
    """A caption as one vector: the mean over its tokens of an MLP of token and place; zeros for an empty caption."""

    def __init__(self, vocab: int, length: int, width: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.token = embedding(vocab, width)
        self.position = positions(length, width)
        self.expand = linear(width, width)
        self.contract = linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """int64 [B, T], empty places hold `vocab` + place, -> [B, C]."""
        real = (text < self.vocab)[..., None]
        rows = self.token(torch.where(real[..., 0], text, 0)) + self.position
        rows = self.contract(F.gelu(self.expand(rows))) * real
        out: Tensor = rows.sum(dim=1) / real.sum(dim=1).clamp(min=1)  # an empty caption sums to zeros
        return out


class PixelSNAIL(nn.Module):
    """A square of codes -> logits of each from all codes before it and the condition."""

    def __init__(
        self,
        *,
        vocab: int,
        grid: int,
        width: int,
        residual_width: int,
        layers: int,
        kernel: int = 5,
        attention_blocks: int = 0,
        heads: int = 8,
        output_layers: int = 0,
        dropout: float = 0.0,
        upper_grids: Sequence[int] = (),
        conditioning_layers: int = 0,
        text_vocab: int = 0,
        text_length: int = 0,
    ) -> None:
        """
        Args:
            width: channels of the residual path.
            residual_width: channels inside the blocks.
            layers: causal residual blocks.
            attention_blocks: spread evenly among them, the last at the end; divides `layers`.
            output_layers: residual blocks of single pixels before the logits.
            dropout: share left out inside the causal blocks while training.
            upper_grids: sides of the coarser squares that condition this one, coarsest first.
            conditioning_layers: residual blocks over those.
            text_length: tokens of a caption that conditions the square; 0 = none.
        """
        super().__init__()
        assert attention_blocks == 0 or layers % attention_blocks == 0
        self.grid = grid
        self.activation_checkpointing = False  # set from outside: recompute each block in the backward pass
        self.code = embedding(vocab, width)
        self.input = CausalConv(width, width, kernel, strict=True)
        self.row = positions(grid, width)
        self.column = positions(grid, width)
        upper = UpperLevels(vocab, upper_grids, grid, width, conditioning_layers) if upper_grids else None
        self.upper = upper
        self.caption = CaptionMean(text_vocab, text_length, width) if text_length else None
        conditioned = bool(upper_grids) or text_length > 0
        gain = (layers + attention_blocks + output_layers) ** -0.5  # so that the residual path starts at unit scale
        self.blocks = nn.ModuleList()
        for layer in range(layers):
            block = CausalBlock(layer, width, residual_width, kernel, conditioned, dropout, gain)
            self.blocks.append(block)
            if attention_blocks and (layer + 1) % (layers // attention_blocks) == 0:
                self.blocks.append(CausalAttention(width, heads, gain))
        self.output = nn.Sequential(*(PixelBlock(width, residual_width, gain=gain) for _ in range(output_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = CodeHead(width, vocab)

    def forward(
        self,
        codes: Tensor,
        upper: Tensor | None = None,
        text: Tensor | None = None,
        seeds: Tensor | None = None,
        step: int = 0,
    ) -> Tensor:
        """Logits of every code of whole squares.

        Args:
            codes: int64 [B, grid * grid], raster order.
            upper: int64 [B, sum of the upper grids squared], where there are any.
            text: int64 [B, T], where the net takes captions.
            seeds: int64 [B], source of the dropout; None = no dropout. In training mode only.
            step: step number, for the dropout.

        Returns:
            fp32 [B, grid * grid, vocab]; row p depends on codes before p only.
        """
        embedded = self.code(codes.reshape(-1, self.grid, self.grid))
        condition = self._condition(upper, text)
        seeds = seeds if self.training else None
        x = self.input(embedded) + (self.row[:, None] + self.column)
        for block in self.blocks:
            x = run(block, x, embedded, condition, seeds, step, recompute=self.activation_checkpointing)
        return self._logits(x.flatten(0, 2)).view(*codes.shape, -1)

    def prefill(self, count: int, upper: Tensor | None = None, text: Tensor | None = None) -> Decoding:
        """Compute the condition of `count` squares to sample, as in `forward`; `decode_step` continues."""
        decoding = Decoding(count, self.grid, self._condition(upper, text))
        decoding.codes = RowBuffer(self.input, count, self.grid)
        decoding.caches = [cast(Block, block).prefill(decoding) for block in self.blocks]
        return decoding

    def decode_step(self, codes: Tensor | None, decoding: Decoding) -> Tensor:
        """The last code of each square, int64 [B] (None at the start) -> fp32 logits [B, vocab] of the next."""
        rows, column = decoding.codes, decoding.column
        assert rows is not None and (codes is None) == (decoding.index == 0)
        if codes is not None:
            decoding.previous = self.code(codes)
            rows.put(decoding.previous, (column or self.grid) - 1)
        if column == 0:
            rows.start_row()
        x = rows.read(column) + (self.row[decoding.index // self.grid] + self.column[column])
        for block, cache in zip(self.blocks, decoding.caches, strict=True):
            x = cast(CausalBlock, block).decode_step(x, decoding, cast("tuple[RowBuffer, RowBuffer]", cache))
        decoding.index += 1
        return self._logits(x)

    def _condition(self, upper: Tensor | None, text: Tensor | None) -> Tensor | None:
        """Condition of every pixel: [B, grid or 1, grid or 1, C], None without condition."""
        condition: Tensor | None = None
        if self.upper is not None:
            assert upper is not None
            condition = self.upper(upper)
        if self.caption is not None:
            assert text is not None
            caption = self.caption(text)[:, None, None]
            condition = caption if condition is None else condition + caption
        return condition

    def _logits(self, x: Tensor) -> Tensor:
        """States of pixels [N, C] -> fp32 [N, vocab]."""
        logits: Tensor = self.head(F.elu(self.norm(self.output(x)))[:, :, None, None])
        return logits.flatten(1)
