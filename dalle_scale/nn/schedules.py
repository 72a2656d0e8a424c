"""Schedules of scalars: pure functions of the step number, so that a resumed run needs no state."""

from __future__ import annotations

import math


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`; `end` ever after.

    The shape of all three schedules of the dVAE (arXiv 2102.12092, App. A.2). `steps` 0 means `end` from the start.
    """
    progress = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
