"""The parts of the diffusion UNet (arXiv 2006.11239, App. B): residual block, attention, halving and doubling of sides.

Maps are [B, C, H, W]; on CPUs they lie in memory as nn/winograd.py wants them, elsewhere as planes. Weights start
uniform in +-sqrt(6 / (inputs + outputs)) ("fan_avg" of the paper's code), biases at 0, and the last layer of every
residual branch at 0: the net starts as the identity of its residual paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dalle_scale.nn.blocks import run
from dalle_scale.nn.counter_rng import uniform_noise
from dalle_scale.nn.half_on_cpu import GroupNorm, attend_all, widened
from dalle_scale.nn.winograd import conv3x3

EPS = 1e-6


def norm_groups(width: int) -> int:
    """Groups of all norms of a net of this width: 32 (as in the paper) from 128 channels on, below groups of 4.

    A group of one channel would subtract whatever is added to a channel, and with it all that a residual block hears
    of the time.
    """
    return min(32, width // 4)


def laid_out(x: Tensor) -> Tensor:
    """A map [B, C, H, W] as it should lie in memory on its device."""
    return x.contiguous(memory_format=torch.channels_last if x.device.type == "cpu" else torch.contiguous_format)


class Conv1x1(nn.Conv2d):
    """Product of the channels of each position."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 1)
        _started(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H, W]."""
        if x.device.type != "cpu":
            return super().forward(x)
        rows = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)  # torch's own way takes twice as long
        return rows.permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """Convolution that keeps the size."""

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, 3, padding=1)
        _started(self, zero)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H, W], plus a shift [B, n_out]."""
        assert self.bias is not None
        return conv3x3(x, self.weight, self.bias if shift is None else self.bias + shift)


def linear(n_in: int, *widths: int, zero: bool = False) -> nn.Linear:
    """Layers n_in -> each of `widths` in one product, each started as if it were alone; their rows follow in order."""
    layer = nn.Linear(n_in, sum(widths))
    for rows in torch.split(layer.weight, list(widths)):
        nn.init.zeros_(rows) if zero else nn.init.xavier_uniform_(rows)
    nn.init.zeros_(layer.bias)
    return layer


def _started(layer: nn.Conv2d, zero: bool = False) -> nn.Conv2d:
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class NormSwish(nn.Module):
    """Swish of group norm, then dropout. What lies between is computed again in the backward pass instead of kept: half
    the memory for three passes over a map."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, dropout: Dropout | None = None, block: int = 0) -> Tensor:
        """[B, C, H, W], same shape."""
        settings = (self.groups, dropout, block)
        out: Tensor = _NormSwish.apply(laid_out(x), self.weight, self.bias, *settings)  # type: ignore[no-untyped-call]
        return out


class _NormSwish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, dropout: Dropout | None, block: int
    ) -> Tensor:
        count, width, height, columns = x.shape
        sizes = (count, width, height * columns, groups)
        wide_x, wide_weight, wide_bias = widened(x, weight, bias)
        y, mean, rstd = torch.native_group_norm(wide_x, wide_weight, wide_bias, *sizes, EPS)
        y = y.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.dropout, ctx.block = groups, dropout, block
        y = F.silu(y, inplace=True)
        return y if dropout is None else dropout.drop(y, block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        count, width, height, columns = x.shape
        grad = laid_out(grads[0])
        if ctx.dropout is not None:
            grad = ctx.dropout.drop(grad, ctx.block)
        # y = scale x + shift, in fp32 on the few numbers of each channel
        scale = (rstd.float()[:, :, None] * weight.float().view(ctx.groups, -1)).view(count, width)
        shift = bias.float() - mean.float().repeat_interleave(width // ctx.groups, dim=1) * scale
        y = torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])
        grad = torch.ops.aten.silu_backward(grad, y)
        sizes, wanted = (count, width, height * columns, ctx.groups), list(ctx.needs_input_grad[:3])
        wide = widened(grad, x, mean, rstd, weight)
        found = torch.ops.aten.native_group_norm_backward(*wide, *sizes, wanted)
        found = [part if part is None else part.to(x.dtype) for part in found]
        return (*found, None, None, None)


@dataclass(frozen=True)
class Dropout:
    """Dropout of all blocks of a net in one pass: functions of the seed and step of a sample and of the place alone.

    A value falls if the product of a random number of its place and a random odd number of its sample and block, both
    made once a pass, is small modulo 2^32: one multiplication a value. Places of one sample are independent of each
    other; the same place of two samples (or blocks) shares a factor, and is as good as independent for almost all
    pairs of samples.
    """

    share: float
    places: Tensor  # int32 [largest C x H x W]
    keys: Tensor  # int32 [B, blocks]

    @classmethod
    def of(cls, share: float, seeds: Tensor, step: int, blocks: int, count: int) -> Dropout:
        """count: values of the largest map."""
        places = uniform_noise(torch.zeros_like(seeds[:1]), 0, count)[0]
        # (n + 1/2) / 2^23 -> 2 n + 1, odd numbers below 2^24; times 2^8 they fill the upper bits, which decide
        keys = (uniform_noise(seeds, step, blocks) * 2**24).to(torch.int32)
        return cls(share, (places * 2**24).to(torch.int32) << 8, keys)

    def kept(self, x: Tensor, block: int) -> Tensor:
        """bool, the shape of x [B, C, H, W]; channels count fastest, however x is laid out."""
        count, width, height, columns = x.shape
        bits = self.places[: x[0].numel()] * self.keys[:, block, None]  # wraps around: uniform in -2^31 .. 2^31
        kept = bits >= round((self.share - 0.5) * 2**32)
        return kept.view(count, height, columns, width).permute(0, 3, 1, 2)

    def drop(self, x: Tensor, block: int) -> Tensor:
        """x [B, C, H, W] with zeros where a value falls, the others scaled up."""
        return (x * self.kept(x, block)).mul_(1 / (1 - self.share))


class ResBlock(nn.Module):
    """x + branch(x, time); the branch is twice group norm, swish and 3x3 convolution, the time added between them."""

    def __init__(self, number: int, n_in: int, n_out: int, groups: int) -> None:
        """number: place in the net, for dropout."""
        super().__init__()
        self.number = number
        self.norm1 = NormSwish(n_in, groups)
        self.conv1 = Conv3x3(n_in, n_out)
        self.norm2 = NormSwish(n_out, groups)
        self.conv2 = Conv3x3(n_out, n_out, zero=True)
        self.skip = Conv1x1(n_in, n_out) if n_in != n_out else None
        self.activation_checkpointing = False  # set from outside: recompute the branch in the backward pass

    def forward(self, x: Tensor, time: Tensor, dropout: Dropout | None) -> Tensor:
        """[B, n_in, H, W] and [B, n_out] -> [B, n_out, H, W]."""
        branch = run(self._branch, x, time, dropout, recompute=self.activation_checkpointing)
        # in place: no convolution needs its output in the backward pass
        skip: Tensor = x if self.skip is None else self.skip(x)
        return branch.add_(skip)

    def _branch(self, x: Tensor, time: Tensor, dropout: Dropout | None) -> Tensor:
        y = self.conv1(self.norm1(x), time)
        out: Tensor = self.conv2(self.norm2(y, dropout, self.number))
        return out


class Attention(nn.Module):
    """x + attention between all positions, one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=EPS)
        self.query_key_value = linear(width, width, width, width)
        self.output = linear(width, width, zero=True)
        self.activation_checkpointing = False  # set from outside: recompute the branch in the backward pass

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], same shape."""
        return x + run(self._branch, x, recompute=self.activation_checkpointing)

    def _branch(self, x: Tensor) -> Tensor:
        rows = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H W, C]
        query, key, value = self.query_key_value(rows)[:, None].chunk(3, dim=-1)
        mixed = attend_all(query, key, value)[:, 0]
        out: Tensor = self.output(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class Halve(nn.Module):
    """3x3 convolution at every second position. It looks right and down from there ("SAME" padding of the paper's
    code, for even sides)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _started(nn.Conv2d(width, width, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Double(Conv3x3):
    """Nearest-neighbour upsampling and a 3x3 convolution."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, 2 H, 2 W]."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"), shift)
