"""Causal convolution of PixelSNAIL (arXiv 1712.09763, Sec. 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv(nn.Module):
    """Convolution that sees `kernel // 2` rows above, and its own row up to itself (strict: up to the pixel before)."""

    def __init__(self, n_in: int, n_out: int, kernel: int, strict: bool = False, gain: float = 1.0) -> None:
        """gain: weights ~ N(0, gain / sqrt(inputs of an output)), biases 0."""
        super().__init__()
        assert kernel % 2 == 1 and kernel > 1
        self.reach, self.taps = kernel // 2, kernel // 2 + (not strict)
        self.above = nn.Parameter(torch.empty(n_out, n_in, self.reach, kernel))
        self.left = nn.Parameter(torch.empty(n_out, n_in, 1, self.taps))
        self.bias = nn.Parameter(torch.zeros(n_out))
        std = gain / math.sqrt(n_in * (self.reach * kernel + self.taps))
        for weight in (self.above, self.left):
            nn.init.normal_(weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, n_in] -> [B, H, W, n_out]."""
        own_row = F.pad(self.left, (0, 2 * self.reach + 1 - self.taps))  # zeros for what comes later
        weight = torch.cat([self.above, own_row], dim=2)
        y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), (self.reach, self.reach, self.reach, 0)), weight, self.bias)
        return y.permute(0, 2, 3, 1)
