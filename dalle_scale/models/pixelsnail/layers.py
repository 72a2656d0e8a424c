"""The parts of PixelSNAIL (arXiv 1712.09763, Sec. 2): causal convolutions, gated residual blocks, causal attention.

States are [B, H, W, C], pixels first, so that whatever works on each pixel alone takes whole squares and single pixels
alike. Each causal part computes whole squares (`forward`) or the next pixel of B squares (`prefill`, then `decode_step`
for each pixel): the same numbers but for the rounding of sums.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.transformer.kv_cache import RingBuffer
from dalle_scale.nn.blocks import embedding_parameter, initialized
from dalle_scale.nn.causal_conv import CausalConv
from dalle_scale.nn.counter_rng import uniform_noise
from dalle_scale.nn.half_on_cpu import attend_all

_BLOCKS_MAX = 1 << 16  # of one net: the noise of step u and block b is number u * _BLOCKS_MAX + b


class RowBuffer:
    """Input rows that one causal convolution still sees while B squares are decoded pixel by pixel."""

    def __init__(self, conv: CausalConv, count: int, grid: int) -> None:
        n_out, n_in = conv.above.shape[:2]
        self._conv, self._n_in = conv, n_in
        # The row in work is the last; zeros on both sides and above are the padding of the convolution
        self._inputs = conv.bias.new_zeros(count, conv.reach + 1, grid + 2 * conv.reach, n_in)
        self._row = self._inputs[:, -1].view(count, -1)  # pixel after pixel, so that a window is one slice
        self._matrix = conv.left[:, :, 0].permute(2, 1, 0).reshape(conv.taps * n_in, n_out).contiguous()
        self._base: Tensor = conv.bias  # [B, W, n_out] from the first `start_row` on

    def start_row(self, extra: Tensor | None = None) -> None:
        """Go to the next row: what the rows above, the bias and `extra` [B or 1, W or 1, n_out] add to its pixels."""
        self._inputs[:, :-1] = self._inputs[:, 1:].clone()
        above = F.conv2d(self._inputs[:, :-1].permute(0, 3, 1, 2), self._conv.above, self._conv.bias)
        base = above[:, :, 0].transpose(1, 2)
        self._base = (base if extra is None else base + extra).contiguous()

    def put(self, x: Tensor, column: int) -> None:
        """The input of a pixel of this row, [B, n_in]."""
        start = (column + self._conv.reach) * self._n_in
        self._row[:, start : start + self._n_in] = x

    def read(self, column: int) -> Tensor:
        """The output of a pixel of this row, [B, n_out]; what it sees must have been put."""
        window = self._row[:, column * self._n_in : (column + self._conv.taps) * self._n_in]
        return torch.addmm(self._base[:, column], window, self._matrix)


class Decoding:
    """B squares in the middle of being sampled: the next code, and the cache of each part of the net."""

    def __init__(self, count: int, grid: int, condition: Tensor | None) -> None:
        self.count, self.grid, self.condition = count, grid, condition
        self.index = 0  # of the next code
        self.previous: Tensor | None = None  # embedding [B, C] of the last code
        self.codes: RowBuffer | None = None  # of the first convolution
        self.caches: list[Cache] = []  # of each block

    @property
    def column(self) -> int:
        """Column of the next code."""
        return self.index % self.grid

    def condition_row(self) -> Tensor | None:
        """Condition of the row of the next code: [B, W or 1, C]."""
        if self.condition is None:
            return None
        return self.condition[:, self.index // self.grid if self.condition.shape[1] > 1 else 0]


class CausalBlock(nn.Module):
    """Gated residual block of two causal convolutions: x + a sigmoid(b), the condition added in between."""

    def __init__(
        self, number: int, width: int, inner: int, kernel: int, conditioned: bool, dropout: float, gain: float
    ) -> None:
        """number: place in the net, for the noise of dropout. gain: of the branch's start."""
        super().__init__()
        assert number < _BLOCKS_MAX
        self.number, self.dropout = number, dropout
        self.norm = nn.LayerNorm(width)
        self.first = CausalConv(width, inner, kernel)
        self.condition = nn.Linear(width, inner, bias=False) if conditioned else None
        self.second = CausalConv(inner, 2 * width, kernel, gain=gain)

    def forward(
        self, x: Tensor, embedded: Tensor, condition: Tensor | None, seeds: Tensor | None = None, step: int = 0
    ) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]; with seeds int64 [B], dropout of step `step`. Leaves `embedded` alone."""
        y = self.first(F.elu(self.norm(x)))
        if self.condition is not None:
            y = y + self.condition(condition)
        y = F.elu(y)
        if seeds is not None and self.dropout:
            y = _dropout(y, self.dropout, seeds, step * _BLOCKS_MAX + self.number)
        return x + F.glu(self.second(y), dim=-1)

    def prefill(self, decoding: Decoding) -> tuple[RowBuffer, RowBuffer]:
        """The cache of this part, still empty."""
        return RowBuffer(self.first, decoding.count, decoding.grid), RowBuffer(
            self.second, decoding.count, decoding.grid
        )

    def decode_step(self, x: Tensor, decoding: Decoding, rows: tuple[RowBuffer, RowBuffer]) -> Tensor:
        """State of one pixel [B, C] -> [B, C]."""
        first, second = rows
        column = decoding.column
        if column == 0:
            first.start_row(None if self.condition is None else self.condition(decoding.condition_row()))
            second.start_row()
        first.put(F.elu(self.norm(x)), column)
        second.put(F.elu(first.read(column)), column)
        return x + F.glu(second.read(column), dim=-1)


class PixelBlock(nn.Module):
    """Gated residual block of single pixels (1x1 convolutions), with room for a second input in between."""

    def __init__(self, width: int, inner: int, extra: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = linear(width, inner)
        self.extra = linear(width, inner) if extra else None
        self.second = linear(inner, 2 * width, gain)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        """[..., C] and [..., C] -> [..., C]."""
        y = self.first(F.elu(self.norm(x)))
        if self.extra is not None:
            y = y + self.extra(extra)
        out: Tensor = x + F.glu(self.second(F.elu(y)), dim=-1)
        return out


class AttentionCache:
    """Keys and values of all pixels of B squares. Slot 0 is nothing; slot p + 1 belongs to pixel p."""

    def __init__(self, count: int, heads: int, slots: int, width: int, like: Tensor) -> None:
        self.buffer = RingBuffer(1, slots)
        self.buffer.allocate(count * heads, like.new_empty(width // heads))
        self.state: Tensor | None = None  # of the last pixel, [B, C]


class CausalAttention(nn.Module):
    """Each pixel asks all earlier ones (Sec. 2.2 of the paper): keys and values come from the state of a pixel and its
    own code, so a pixel does not see itself. The first has nothing to see: a key of zeros in front, worth zeros, makes
    its softmax defined, and lets every other pixel look at nothing too."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        assert width % heads == 0
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = linear(width, width)
        self.key = linear(2 * width, width)
        self.value = linear(2 * width, width)
        self.merge = PixelBlock(width, width, extra=True, gain=gain)

    def forward(
        self, x: Tensor, embedded: Tensor, condition: Tensor | None, seeds: Tensor | None = None, step: int = 0
    ) -> Tensor:
        """States and embedded codes [B, H, W, C] -> states. Needs neither condition nor noise."""
        state = self.norm(x)
        content = torch.cat([state, embedded], dim=-1)

        def split(rows: Tensor) -> Tensor:
            return rows.reshape(len(x), -1, self.heads, rows.shape[-1] // self.heads).transpose(1, 2)

        query, key, value = split(self.query(state)), split(self.key(content)), split(self.value(content))
        key, value = (F.pad(rows[:, :, :-1], (0, 0, 1, 0)) for rows in (key, value))
        mixed = attend_all(query, key, value, is_causal=True)
        out: Tensor = self.merge(x, mixed.transpose(1, 2).reshape(x.shape))
        return out

    def prefill(self, decoding: Decoding) -> AttentionCache:
        """The cache of this part, still empty."""
        return AttentionCache(decoding.count, self.heads, decoding.grid**2, len(self.query.weight), self.query.weight)

    def decode_step(self, x: Tensor, decoding: Decoding, cache: AttentionCache) -> Tensor:
        """State of one pixel [B, C] -> [B, C]. The last pixel's key is made now that its code is known."""
        index, width = decoding.index, x.shape[1] // self.heads
        newest = x.new_zeros(2, len(x), self.heads, width)
        if index:
            assert cache.state is not None and decoding.previous is not None
            content = torch.cat([cache.state, decoding.previous], dim=-1)
            newest = torch.stack([self.key(content), self.value(content)]).view(newest.shape)
        (keys, values), _ = cache.buffer.append(newest, index)
        cache.state = self.norm(x)
        query = self.query(cache.state).view(-1, 1, width) * width**-0.5
        shares = torch.bmm(query, keys.mT).softmax(-1, dtype=torch.float32).to(x.dtype)
        out: Tensor = self.merge(x, torch.bmm(shares, values).view(x.shape))
        return out


Block: TypeAlias = CausalBlock | CausalAttention
Cache: TypeAlias = "tuple[RowBuffer, RowBuffer] | AttentionCache"


def linear(n_in: int, n_out: int, gain: float = 1.0) -> nn.Linear:
    """Weights ~ N(0, gain / sqrt(n_in)), biases 0."""
    return initialized(nn.Linear(n_in, n_out), std=gain / math.sqrt(n_in))


def embedding(vocab: int, width: int) -> nn.Embedding:
    """One row ~ N(0, 1) a code; never decayed."""
    table = nn.Embedding(vocab, width)
    table.weight.is_embedding = True  # type: ignore[attr-defined]
    return table


def positions(count: int, width: int) -> nn.Parameter:
    """One row ~ N(0, 0.1) a place; never decayed."""
    return embedding_parameter(0.1 * torch.randn(count, width))


def _dropout(x: Tensor, share: float, seeds: Tensor, counter: int) -> Tensor:
    """Zero a share of x [B, ...] and scale up the rest; the mask is a function of seed, counter and place alone."""
    kept = uniform_noise(seeds, counter, x[0].numel()).view(x.shape) >= share
    return x * kept / (1 - share)
