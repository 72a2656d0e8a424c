"""The learning rate as a factor of its peak: a function of the step number; "plateau" also looks at the losses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist
from dalle_scale.config import ScheduleConfig


class Schedule:
    """Factor of the peak learning rate at each step.

    "plateau" halves the factor when the mean training loss of a window is not below the best window's by a margin
    (arXiv 2102.12092, Sec. 2.3 halves "each time the training loss appears to plateau", five times). Only this kind
    has a state; it is part of a checkpoint.
    """

    def __init__(self, config: ScheduleConfig, steps: int) -> None:
        self.config = config
        self.end = config.decay_steps or steps  # of the cosine
        self.halvings = 0
        self.best = math.inf
        self._seen = 0  # steps in the current window
        self._sum: Tensor | None = None  # of their losses on this rank, fp64, on the loss's device

    def factor(self, step: int) -> float:
        """Factor in 0 .. 1 for step `step`, counted from 0. The warm-up reaches 1 at step `warmup_steps - 1`,
        the cosine reaches `final_factor` at step `end`."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        if self.config.kind == "cosine":
            progress = min(1.0, (step - warmup) / max(1, self.end - warmup))
            final = self.config.final_factor
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 0.5**self.halvings

    def observe(self, loss: Tensor) -> None:
        """Take note of a step's training loss on this rank (detached scalar). All ranks call it equally often; only
        the last call of a window communicates."""
        if self.config.kind != "plateau" or self.halvings >= self.config.plateau_halvings:
            return
        loss = loss.detach().to(torch.float64)
        self._sum = loss.clone() if self._sum is None else self._sum + loss
        self._seen += 1
        if self._seen == self.config.plateau_window_steps:
            self._close_window(dist.all_reduce(self._sum, "mean").item() / self._seen)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint. Collective: from here on every rank continues from the mean of all ranks, in the
        run that continues just as in one that resumes."""
        total = None if self._sum is None else dist.all_reduce(self._sum, "mean").item()
        best = self.best if math.isfinite(self.best) else None  # JSON has no infinity
        return {"halvings": self.halvings, "best": best, "seen": self._seen, "sum": total}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.halvings, self._seen = state["halvings"], state["seen"]
        self.best = math.inf if state["best"] is None else state["best"]
        self._sum = (
            None if state["sum"] is None else torch.tensor(state["sum"], dtype=torch.float64, device=dist.device())
        )

    def _close_window(self, mean: float) -> None:
        if mean > self.best - self.config.plateau_margin:
            self.halvings += 1
        self.best = min(self.best, mean)
        self._sum, self._seen = None, 0
