"""Parts of convolutional nets: convolutions with their initialization, doubling and halving of maps, recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle_scale.nn.conv import Conv

Layer = TypeVar("Layer", bound="nn.Conv2d | nn.ConvTranspose2d | nn.Linear")


def initialized(layer: Layer, std: float) -> Layer:
    """The layer with weights ~ N(0, std) and biases 0."""
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def conv(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size; weights ~ N(0, 1 / sqrt(n_in kernel^2)), biases 0."""
    return initialized(nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2), std=1 / math.sqrt(n_in * kernel**2))


def own_conv(n_in: int, n_out: int, kernel: int) -> Conv:
    """`conv` in the fastest way on CPUs, with ReLU before and a sum after as it is called."""
    return initialized(Conv(n_in, n_out, kernel), std=1 / math.sqrt(n_in * kernel**2))


def embedding_parameter(values: Tensor) -> nn.Parameter:
    """A parameter with one row a code, token or place: never decayed and never orthogonalised."""
    parameter = nn.Parameter(values)
    parameter.is_embedding = True  # type: ignore[attr-defined]
    return parameter


def run(module: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """module(*inputs); with `recompute`, what it computes inside is computed again in the backward pass, not kept."""
    if recompute and torch.is_grad_enabled():  # no module draws from torch's generator, whose state need not be kept
        output: Tensor = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        output = module(*inputs)
    return output


def on_cpu(x: Tensor) -> bool:
    """Whether to compute as CPUs like it. Tests that compare with other devices say no."""
    return x.device.type == "cpu"


def double(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, C, 2 h, 2 w], each value four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class Halve(nn.Module):
    """The largest of each 2x2 values: [B, C, 2 h, 2 w] -> [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        """On CPUs the backward pass keeps bits; torch's keeps the map and int64 places."""
        if not on_cpu(x):
            return F.max_pool2d(x, 2)
        halved: Tensor = _Halving.apply(x)  # type: ignore[no-untyped-call]
        return halved


class _Halving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        left, right = rows[:, :, ::2], rows[:, :, 1::2]
        is_right, wider = right > left, torch.maximum(left, right)
        upper, lower = wider[:, ::2], wider[:, 1::2]
        ctx.save_for_backward(is_right, lower > upper)
        halved = torch.empty_like(x[:, :, ::2, ::2], memory_format=torch.channels_last)
        torch.maximum(upper, lower, out=halved.permute(0, 2, 3, 1))
        return halved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        is_right, is_lower = ctx.saved_tensors
        rows = grads[0].permute(0, 2, 3, 1)
        count, height, width, channels = rows.shape
        wider = rows.new_empty(count, 2 * height, width, channels)
        lower = torch.mul(
            rows, is_lower, out=wider[:, 1::2]
        )  # products and differences: `where` takes four times as long
        torch.sub(rows, lower, out=wider[:, ::2])
        slopes = rows.new_empty(count, 2 * height, 2 * width, channels)
        right = torch.mul(wider, is_right, out=slopes[:, :, 1::2])
        torch.sub(wider, right, out=slopes[:, :, ::2])
        return slopes.permute(0, 3, 1, 2)


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """Computes in the precision of the operands; devices without autocast (meta) do so anyway."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
