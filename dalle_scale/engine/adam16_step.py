"""Coefficients of one step of AdamW16, on CPUs (adam16.py) and on GPUs (adam16_kernel.py)."""

from __future__ import annotations

from typing import NamedTuple

from dalle_scale.nn.float_formats import SmallFloat

Formats = tuple[SmallFloat | None, SmallFloat | None, SmallFloat | None]  # None is fp32
Keys = tuple[int | None, ...]


class StepCoefficients(NamedTuple):
    """Coefficients of one step, computed in Python's doubles, used as fp32.

    There is no divisor among them: torch divides by a number on CPUs, and multiplies with its inverse on GPUs.
    """

    gradient_scale: float
    mean_kept: float
    mean_new: float
    variance_kept: float
    variance_new: float
    variance_clip: float
    deviation_scale: float
    eps: float
    rate: float
    weights_kept: float
