"""The Gumbel-softmax relaxation, its noise, and the KL to the uniform prior (arXiv 2102.12092, Sec. 2.1).

The logits [..., K] are by far the largest tensor of a dVAE, and these functions keep few copies of it: backward holds
the logits and the relaxed assignment, nothing else of that size. All of it is fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_MIX_64 = 0xBF58476D1CE4E5B9  # a multiplier of the splitmix64 finalizer


def gumbel_noise(seeds: Tensor, step: int, count: int) -> Tensor:
    """Standard Gumbel noise fp32 [B, count], a pure function of (seed, step, position).

    Counter-based: a sample's noise does not depend on its batch, rank, world size or device. A uniform number is a
    32-bit hash of (hash of the position) xor (hash of seed and step).

    Args:
        seeds: int64 [B], one a sample.
        step: update number.
        count: numbers per sample, below 2^31.
    """
    assert count < 1 << 31
    positions = _mix32(torch.arange(count, dtype=torch.int32, device=seeds.device))
    bits = _mix32(positions ^ _keys(seeds, step)[:, None])
    # 23 bits and a half: exact in fp32 and never 0 or 1, so that both logarithms are finite
    uniform = (bits >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def gumbel_softmax(logits: Tensor, tau: float, seeds: Tensor, step: int) -> Tensor:
    """Relaxed one-hot sample softmax((logits + Gumbel noise) / tau), same shape; no straight-through.

    Args:
        logits: fp32 [B, ..., K].
        tau: temperature > 0.
        seeds: int64 [B].
        step: update number.
    """
    noise = gumbel_noise(seeds, step, logits[0].numel()).view(logits.shape)
    return torch.softmax(noise.add_(logits).div_(tau), dim=-1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) in nats, [..., K] -> [...]: log K minus the entropy.

    Of the raw logits whatever the temperature of the relaxation is (the paper's author, openai/DALL-E issue 26).
    """
    kl: Tensor = _KLToUniform.apply(logits)  # type: ignore[no-untyped-call]
    return kl


class _KLToUniform(torch.autograd.Function):
    """Saves the logits (alive anyhow) and one number a row; written out, autograd would keep two more copies."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1)
        negative_entropy = log_p.exp().mul_(log_p).sum(dim=-1)
        ctx.save_for_backward(logits, negative_entropy)
        return negative_entropy + math.log(logits.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # d(sum p log p) / d logit_k = p_k (log p_k - sum p log p)
        logits, negative_entropy = ctx.saved_tensors
        log_p = torch.log_softmax(logits, dim=-1)
        p = log_p.exp()
        return log_p.sub_(negative_entropy[..., None]).mul_(p).mul_(grads[0][..., None])


def _keys(seeds: Tensor, step: int) -> Tensor:
    """int32 [B]: one key per (seed, step)."""
    key = (seeds + _signed(step * _GOLDEN, 64)) * _signed(_MIX_64, 64)
    key = (key ^ (key >> 31)) * _signed(_GOLDEN, 64)
    return _mix32((key >> 32).to(torch.int32))


def _mix32(bits: Tensor) -> Tensor:
    """A bijective hash of 32-bit words (the "lowbias32" constants of C. Wellons), in place on int32.

    Shifts of int32 copy the sign bit down; the masks take those copies off again.
    """
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= _signed(0x7FEB352D, 32)
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= _signed(0x846CA68B, 32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def _signed(value: int, bits: int) -> int:
    """The two's complement integer with the lowest `bits` bits of `value`."""
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value
