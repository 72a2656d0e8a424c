"""The Gumbel-softmax relaxation, its noise, and the KL to the uniform prior (arXiv 2102.12092, Sec. 2.1).

The logits [..., K] are by far the largest tensor of a dVAE, and these functions keep few copies of it: backward holds
the logits and the relaxed assignment, nothing else of that size. All of it is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dalle_scale.nn.counter_rng import uniform_noise

_ROWS_AT_ONCE = 8  # so many rows of 8192 numbers stay in a core's second cache


def gumbel_noise(seeds: Tensor, step: int | Tensor, count: int) -> Tensor:
    """Standard Gumbel noise fp32 [B, count], a pure function of (seed, step, position).

    Args:
        seeds: int64 [B], one a sample.
        step: step number; or int64 [B], one a sample.
        count: numbers per sample, below 2^31.
    """
    return uniform_noise(seeds, step, count).log_().neg_().log_().neg_()


def gumbel_steps(seeds: Tensor, steps: range, count: int) -> Iterator[Tensor]:
    """`gumbel_noise` of each step in turn. Of few samples that of several steps is generated at once: operations on one
    row take longer to call than to compute."""
    ahead = max(1, _ROWS_AT_ONCE // len(seeds))
    for first in steps[::ahead]:
        together = torch.arange(first, min(first + ahead, steps.stop), device=seeds.device)
        rows = gumbel_noise(seeds.repeat(len(together)), together.repeat_interleave(len(seeds)), count)
        yield from rows.view(len(together), len(seeds), count)


def gumbel_softmax(logits: Tensor, tau: float, seeds: Tensor, step: int) -> Tensor:
    """Relaxed one-hot sample softmax((logits + Gumbel noise) / tau), same shape; no straight-through.

    Args:
        logits: fp32 [B, ..., K].
        tau: temperature > 0.
        seeds: int64 [B].
        step: step number.
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
        negative_entropy = logits.new_empty(logits.shape[:-1])
        for part, into in _parts(logits, negative_entropy[..., None]):
            log_p = torch.log_softmax(part, dim=-1)
            torch.sum(log_p.exp().mul_(log_p), dim=-1, keepdim=True, out=into)
        ctx.save_for_backward(logits, negative_entropy)
        return negative_entropy + math.log(logits.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # d(sum p log p) / d logit_k = p_k (log p_k - sum p log p)
        logits, negative_entropy = ctx.saved_tensors
        slopes = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part, mean, grad, into in _parts(logits, negative_entropy[..., None], grads[0][..., None], slopes):
            log_p = torch.log_softmax(part, dim=-1)
            torch.mul(log_p.exp().mul_(grad), log_p.sub_(mean), out=into)
        return slopes


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [..., n] of equal rows as matrices; on CPUs some rows at a time, which stay in the cache."""
    matrices = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    rows = len(matrices[0])
    if tensors[0].device.type == "cpu":
        rows = max(1, int(_ROWS_AT_ONCE * 8192) // max(tensor.shape[-1] for tensor in tensors))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)
