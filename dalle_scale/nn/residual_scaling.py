"""Gradients of residual branches, each scaled by a number of its own (arXiv 2102.12092, Sec. 2.4 and App. D).

Gradients of activations shrink from the last block to the first until their exponents leave the range of fp16. The
identity path stays in fp32; a branch computes in 16 bits between `enter` and `leave`, and only there its gradients are
multiplied by its scale. So are those of its parameters, until the optimizer divides them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class BranchScale:
    """The scale of one branch, 1 until somebody sets `value`."""

    def __init__(self) -> None:
        self.value = 1.0

    def enter(self, x: Tensor) -> Tensor:
        """From the identity path into the branch: x as it is. Backwards the gradient is divided by the scale, and what
        is not finite becomes 0, so that one overflow does not reach all blocks before this one."""
        entered: Tensor = x if self.value == 1 else _Enter.apply(x, self.value)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, branch: Tensor, identity: Tensor) -> Tensor:
        """Out of the branch: `identity` plus the branch, in the type of `identity`. Backwards the branch's gradient is
        multiplied by the scale before it is rounded to the branch's type."""
        if self.value == 1:
            return identity + branch.to(identity.dtype)
        left: Tensor = _Leave.apply(branch, identity.dtype, self.value)  # type: ignore[no-untyped-call]
        return identity + left


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.nan_to_num(gradient / ctx.scale, nan=0.0, posinf=0.0, neginf=0.0), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, branch: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, branch.dtype
        return branch.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (gradient * ctx.scale).to(ctx.dtype), None, None


def branches_of(net: nn.Module) -> list[tuple[BranchScale, list[nn.Parameter]]]:
    """The residual branches that a net tells of, first to last, each with its parameters; none if it has no
    `branches` (nn.transformer.Transformer has)."""
    return net.branches() if hasattr(net, "branches") else []  # type: ignore[operator,no-any-return]


def in_16_bits(net: nn.Module) -> set[nn.Parameter]:
    """The parameters that lose nothing by 16 bits (App. D): matrices in residual branches, not gains, biases,
    embeddings and heads. All of a net that tells of no branches, because its layers compute in one type."""
    branches = branches_of(net)
    if not branches:
        return set(net.parameters())
    return {parameter for _, parameters in branches for parameter in parameters if parameter.ndim > 1}


def cast(net: nn.Module, dtype: str) -> None:
    """Give `in_16_bits` a type of `HALF_TYPES`, in place."""
    for parameter in in_16_bits(net):
        parameter.data = parameter.data.to(HALF_TYPES[dtype])
