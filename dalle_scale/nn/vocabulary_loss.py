"""Cross entropy over a vocabulary, chunk by chunk: logits are never held whole, nor is their gradient.

The gradients of states and weights are made along with the loss, while a chunk of logits is in the caches. That takes
no more products than the usual way, and the memory of one gradient of each instead of several copies of all logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK_BYTES = 1 << 22  # of fp32 logits at a time; the result does not depend on it but for rounding


def weighted_entropy(states: Tensor, weight: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """sum_n shares_n * -log softmax(weight @ states_n)[targets_n], a scalar.

    Args:
        states: fp32 [N, D].
        weight: fp32 [V, D].
        targets: int64 [N], below V.
        shares: fp32 [N]; no gradient is computed for them.
    """
    total: Tensor = _WeightedEntropy.apply(states, weight, targets, shares)
    return total


class _WeightedEntropy(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        trained = any(ctx.needs_input_grad[:2])
        of_states = torch.empty_like(states) if trained else None
        of_weight = torch.zeros_like(weight) if trained else None
        total = states.new_zeros(())
        size = max(1, CHUNK_BYTES // (4 * len(weight)))
        parts = (states.split(size), targets.split(size), shares.split(size))
        for index, (some, wanted, share) in enumerate(zip(*parts, strict=True)):
            logits = some @ weight.T
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            chosen = logits.gather(1, wanted[:, None])
            total += ((normaliser - chosen)[:, 0] * share).sum()
            if of_states is not None and of_weight is not None:
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, wanted[:, None], torch.full_like(chosen, -1.0))
                slope *= share[:, None]
                torch.mm(slope, weight, out=of_states[index * size : index * size + len(some)])
                torch.addmm(of_weight, slope.T, some, out=of_weight)
        if trained:
            ctx.save_for_backward(of_states, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_states, of_weight = ctx.saved_tensors
        return of_states * gradient, of_weight * gradient, None, None
