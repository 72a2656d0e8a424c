"""Cross entropy over a vocabulary, chunk by chunk: logits are never held whole, nor is their gradient.

The gradients of states and weights are made along with the loss, while a chunk of logits is in the caches. That takes
no more products than the usual way, and the memory of one gradient of each instead of several copies of all logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK_BYTES = 1 << 24  # of fp32 logits at a time; the result does not depend on it but for rounding


def weighted_entropy(states: Tensor, weight: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """sum_n shares_n * -log softmax(weight @ states_n)[targets_n], a scalar.

    Args:
        states: fp32 [N, D].
        weight: fp32 [V, D].
        targets: int64 [N], below V.
        shares: fp32 [N]; no gradient is computed for them.
    """
    total: Tensor = _WeightedEntropy.apply(states, weight, targets, shares)  # type: ignore[no-untyped-call]
    return total


class _WeightedEntropy(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        trained = any(ctx.needs_input_grad[:2])
        of_states = torch.empty_like(states) if trained else None
        of_weight = torch.zeros_like(weight) if trained else None
        total = states.new_zeros(())
        size = max(1, min(len(states), CHUNK_BYTES // (4 * len(weight))))
        room = states.new_empty(len(weight) * size)
        parts = (states.split(size), targets.split(size), shares.split(size))
        for index, (some, wanted, share) in enumerate(zip(*parts, strict=True)):
            # A column for each state: this way round the products are faster on CPUs
            logits = torch.mm(weight, some.T, out=room[: len(weight) * len(some)].view(-1, len(some)))
            chosen = logits.gather(0, wanted[None])
            highest = logits.amax(0, keepdim=True)
            logits.sub_(highest).exp_()
            sums = logits.sum(0, keepdim=True)
            total += ((sums.log() + highest - chosen) * share).sum()
            if of_states is not None and of_weight is not None:
                logits.mul_(share / sums).scatter_add_(0, wanted[None], -share[None])  # now the loss's slope by them
                torch.mm(logits.T, weight, out=of_states[index * size : index * size + len(some)])
                torch.addmm(of_weight, logits, some, out=of_weight)
        if trained:
            ctx.save_for_backward(of_states, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_states, of_weight = ctx.saved_tensors
        return of_states * gradient, of_weight * gradient, None, None
