"""Golden values of the paper's schedules (arXiv 2102.12092, App. A.2)."""

from __future__ import annotations

import math

import pytest

from dalle_scale.nn.schedules import cosine


@pytest.mark.parametrize(
    "step, tau", [(0, 1.0), (37_500, 0.0625 + 0.9375 * (2 + math.sqrt(2)) / 4), (75_000, 0.53125), (150_000, 0.0625)]
)
def test_tau(step: int, tau: float) -> None:
    assert cosine(step, 1.0, 1 / 16, 150_000) == pytest.approx(tau, abs=1e-12)


def test_stays_at_the_end() -> None:
    assert cosine(200_000, 1.0, 1 / 16, 150_000) == 1 / 16
    assert cosine(5_000, 0.0, 6.6, 5_000) == 6.6
    assert cosine(2_500, 0.0, 6.6, 5_000) == pytest.approx(3.3)
    assert cosine(0, 0.3, 0.7, 0) == 0.7


def test_is_monotone() -> None:
    values = [cosine(step, 1.0, 0.1, 100) for step in range(120)]
    assert values == sorted(values, reverse=True)
