"""Learning-rate factors against their closed forms; the plateau rule on losses made for it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dalle_scale.config import ScheduleConfig
from dalle_scale.engine.schedule import Schedule


def test_constant_with_warmup() -> None:
    schedule = Schedule(ScheduleConfig(warmup_steps=4), steps=100)
    assert [schedule.factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Schedule(ScheduleConfig(), steps=100).factor(0) == 1.0


@pytest.mark.parametrize(("decay_steps", "end"), [(None, 110), (60, 60)])
def test_cosine(decay_steps: int | None, end: int) -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, decay_steps=decay_steps, final_factor=0.1)
    schedule = Schedule(config, steps=110)
    assert schedule.factor(4) == 0.5
    assert schedule.factor(10) == 1.0
    assert schedule.factor((10 + end) // 2) == pytest.approx(0.55)
    quarter = 10 + (end - 10) / 4
    assert schedule.factor(round(quarter)) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, abs=0.02)
    assert schedule.factor(end) == pytest.approx(0.1) == schedule.factor(end + 1000)


def test_the_paper_s_step_size() -> None:
    """dVAE: 1e-4 to 1.25e-6 over 1,200,000 steps, then held (arXiv 2102.12092, App. A)."""
    config = ScheduleConfig(kind="cosine", decay_steps=1_200_000, final_factor=0.0125)
    schedule = Schedule(config, steps=3_000_000)
    assert 1e-4 * schedule.factor(0) == pytest.approx(1e-4)
    assert 1e-4 * schedule.factor(2_000_000) == pytest.approx(1.25e-6)


def plateau(**settings: float) -> Schedule:
    values = {"plateau_window_steps": 3, "plateau_margin": 0.1, "plateau_halvings": 2, **settings}
    return Schedule(ScheduleConfig(kind="plateau", **values), steps=100)


def observe(schedule: Schedule, *window_means: float) -> list[float]:
    """Factors after each window whose losses have these means."""
    factors = []
    for mean in window_means:
        for offset in (-0.5, 0.0, 0.5):
            schedule.observe(torch.tensor(mean + offset))
        factors.append(schedule.factor(50))
    return factors


def test_plateau_halves_when_a_window_is_no_better() -> None:
    """3.0 and 2.5 improve; 2.45 lacks the margin; 2.3 improves; 2.4 does not; after two halvings it stays."""
    assert observe(plateau(), 3.0, 2.5, 2.45, 2.3, 2.4, 2.4, 9.0) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_plateau_compares_with_the_best_window() -> None:
    assert observe(plateau(), 3.0, 4.0, 3.5, 3.0) == [1.0, 0.5, 0.25, 0.25]


def test_plateau_counts_within_windows_only() -> None:
    schedule = plateau()
    for _ in range(5):
        schedule.observe(torch.tensor(1.0))
    assert schedule.factor(50) == 1.0
    schedule.observe(torch.tensor(1.0))
    assert schedule.factor(50) == 0.5


def test_state_goes_on_in_the_middle_of_a_window() -> None:
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)) + torch.linspace(1, 0, 40)
    whole = plateau(plateau_halvings=9)
    parts = plateau(plateau_halvings=9)
    for index, loss in enumerate(losses):
        whole.observe(loss)
        parts.observe(loss)
        state = json.loads(json.dumps(parts.state()))
        parts = plateau(plateau_halvings=9)
        parts.load(state)
        assert parts.factor(50) == whole.factor(50) and parts.best == whole.best, index
    assert 0 < whole.halvings < 9


def test_other_kinds_ignore_losses() -> None:
    schedule = Schedule(ScheduleConfig(), steps=10)
    for _ in range(20_000):
        schedule.observe(torch.tensor(1.0))
    assert schedule.factor(5) == 1.0 and schedule.state()["seen"] == 0
