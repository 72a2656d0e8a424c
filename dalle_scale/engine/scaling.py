"""Per-branch gradient scales: when they grow and shrink, which steps are skipped, and the norm of what they scale.

DALL-E (arXiv 2102.12092, App. D) starts each scale at M * 2^13 for M data-parallel replicas, because its loss is
divided by the batch of all of them; ours is a mean over this rank's batch, which takes M out of all three constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_scale import dist
from dalle_scale.nn.residual_scaling import BranchScale

START, LOWEST, HIGHEST = 2.0**13, 2.0**7, 2.0**24
GROWTH, BACK_OFF = 2.0 ** (1 / 1000), 2.0**-0.5
PATIENCE_STEPS = 125  # between two divisions of one scale

Gradients = Iterator[tuple[Tensor, dict[str, Any]]]  # what an optimizer step will read, each with its param group


class Scaling:
    """Divisors of gradients in AdamW16's param groups: the scale of their branch, times what clips the norm."""

    def __init__(self, scales: Sequence[BranchScale], dynamic: bool, clip_norm: float) -> None:
        """
        Args:
            scales: of the branches, in order of the groups' "branch".
            dynamic: for fp16; in bf16, whose exponents reach as far as those of fp32, all scales stay 1.
            clip_norm: largest norm of all gradients together; 0 = any.
        """
        self.scales, self.dynamic, self.clip_norm = scales, dynamic, clip_norm
        self.steps = self.skipped = 0
        self.divided: list[int | None] = [None] * len(scales)  # at which step each was last
        if dynamic:
            for scale in scales:
                scale.value = START

    def of(self, group: dict[str, Any]) -> float:
        """The scale of a param group."""
        return self.scales[group["branch"]].value if group["branch"] >= 0 else 1.0

    def finite(self, gradients: Gradients) -> Tensor:
        """bool [branches + 1]: whether all gradients of each branch, and last those outside, are finite on all ranks.
        Collective."""
        broken = torch.zeros(len(self.scales) + 1, dtype=torch.int32, device=dist.device())
        for gradient, group in gradients:
            broken[group["branch"]] |= ~gradient.isfinite().all()
        return dist.all_reduce(broken, "max") == 0

    def apply(
        self,
        groups: Sequence[dict[str, Any]],
        gradients: Gradients,
        finite: Tensor,
        sum_over_shards: Callable[[Tensor], Tensor],
    ) -> bool:
        """Set the groups' divisors for this step and the scales for the next. Collective.

        Args:
            groups: the optimizer's.
            gradients: of this rank, after all averaging.
            finite: of the gradients as they came out of the backward pass, from `finite`.
            sum_over_shards: sum over the ranks that share the gradients out.

        Returns:
            Whether to take the step: everything is finite.
        """
        square = torch.zeros((), dtype=torch.float64, device=dist.device())
        for gradient, group in gradients:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double() / self.of(group)
            square += norm.square()
        *fine, square_norm = torch.cat([finite.double(), sum_over_shards(square)[None]]).tolist()
        norm = math.sqrt(square_norm) if square_norm >= 0 else math.nan
        clip = max(1.0, norm / self.clip_norm) if self.clip_norm > 0 else 1.0
        for group in groups:
            group["gradient_divisor"] = self.of(group) * clip
        self._adapt([flag == 1 for flag in fine[:-1]])
        taken = all(flag == 1 for flag in fine) and math.isfinite(norm)
        self.skipped += not taken
        return taken

    def _adapt(self, fine: Sequence[bool]) -> None:
        """Grow the scales of branches whose gradients are finite, divide the others, not too often."""
        self.steps += 1
        if not self.dynamic:
            return
        for index, (scale, good) in enumerate(zip(self.scales, fine, strict=True)):
            last = self.divided[index]
            if good:
                scale.value *= GROWTH
            elif last is None or self.steps - last >= PATIENCE_STEPS:
                scale.value *= BACK_OFF
                self.divided[index] = self.steps
            scale.value = min(max(scale.value, LOWEST), HIGHEST)

    def numbers(self) -> dict[str, float]:
        """For the log: base-2 logarithms of the smallest, the median and the largest scale, and steps not taken."""
        if not self.dynamic:
            return {}
        exponents = sorted(math.log2(scale.value) for scale in self.scales)
        middle = exponents[len(exponents) // 2]
        found = {"log2_scale_min": exponents[0], "log2_scale_median": middle, "log2_scale_max": exponents[-1]}
        return {**found, "skipped_steps": self.skipped}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; the same on all ranks."""
        scales = [scale.value for scale in self.scales]
        return {"steps": self.steps, "skipped": self.skipped, "divided": self.divided, "scales": scales}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""
        self.steps, self.skipped, self.divided = state["steps"], state["skipped"], state["divided"]
        for scale, value in zip(self.scales, state["scales"], strict=True):
            scale.value = value
