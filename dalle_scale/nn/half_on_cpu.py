"""Operations that take longer in 16 bits than in fp32 on CPUs, and so are done in fp32 there.

Measured with torch 2.13 on a processor that has products of bf16 (AVX-512) but no matrix tiles: attention's fused
kernel takes two to five times as long backwards, group norm of channels-last maps twice. Inputs, results and gradients
keep their type.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle_scale.nn.residual_scaling import HALF_TYPES


def is_half_on_cpu(x: Tensor) -> bool:
    """Whether x has 16 bits and lies on a CPU."""
    return x.dtype in HALF_TYPES.values() and x.device.type == "cpu"


def widened(*states: Tensor) -> tuple[Tensor, ...]:
    """The tensors, those of 16 bits on a CPU in fp32."""
    return tuple(x.float() if is_half_on_cpu(x) else x for x in states)


def attend_all(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention`."""
    query_, key_, value_ = widened(query, key, value)
    return F.scaled_dot_product_attention(query_, key_, value_, is_causal=is_causal).to(query.dtype)


def attention_kernel(like: Tensor) -> AbstractContextManager[None]:
    """For nets of other libraries, which call torch's attention themselves on states such as `like`: 16 bits on a CPU
    by plain products, which are as fast as in fp32 while sequences are short."""
    return sdpa_kernel(SDPBackend.MATH) if is_half_on_cpu(like) else nullcontext()


class GroupNorm(nn.GroupNorm):
    """torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W], same shape."""
        if not (is_half_on_cpu(x) and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        wide, weight, bias = widened(x, self.weight, self.bias)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)
