"""Linear layers whose matrix may be of 16 bits while the bias is fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer whose matrix may be of 16 bits while its bias is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], all in the type of the matrix."""
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class TransposedLinear(nn.Module):
    """A linear layer as above that keeps its matrix as [in, out].

    ZeRO 3 gives each rank a block of a matrix's rows. Where there are more inputs than outputs, blocks along the inputs
    are nearer to square than blocks along the outputs, and the factors into which PowerSGD takes them are shorter
    (arXiv 2102.12092, App. E: the second matrix of an MLP is cut along the other axis than all others).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_t = nn.Parameter(torch.empty(inputs, outputs))
        self.weight_t.is_transposed = True  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.empty(outputs))

    @property
    def weight(self) -> Tensor:
        """A view [out, in]."""
        return self.weight_t.t()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], all in the type of the matrix."""
        return F.linear(x, self.weight, self.bias.to(x.dtype))
