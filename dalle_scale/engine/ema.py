"""Exponential moving average of the weights: fp32, and each rank averages only what it steps.

An average of 16-bit weights stands still (a step of 1e-4 of the difference is below their resolution), and averaging
gathered weights would cost a collective per step. So the average lives beside the fp32 weights that this rank owns,
without communication, and is gathered only where it is used: previews, validation, exports.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dalle_scale.engine import masters


class Ema:
    """average <- average + (1 - decay) * (weights - average) after every step; starts at the initial weights."""

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.average = [tensor.float().clone() for tensor in masters.owned(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current weights."""
        weights = [tensor.float() for tensor in masters.owned(self.engine)]
        torch._foreach_lerp_(self.average, weights, 1 - self.decay)

    @contextmanager
    def half_precision_parameters(self) -> Iterator[None]:
        """Inside the block the weights hold the average, so that gathering them gives it; no training there."""
        weights = masters.owned(self.engine)
        kept = [tensor.clone() for tensor in weights]  # not exchanged: 16-bit weights would round the average
        torch._foreach_copy_(weights, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)
