"""Balanced weights and means against the mean over the samples themselves."""

from __future__ import annotations

import pytest
import torch

from dalle_scale.engine.batches import Means, balance
from dalle_scale.types import Losses


def test_balance_makes_the_mean_weight_1() -> None:
    batches = [{"weight": torch.tensor([1.0, 0.0])}, {"weight": torch.tensor([1.0, 1.0])}]
    assert balance(batches, 4, 0.0, True) == [3.0, 0.0, 1.0]
    assert [batch["weight"].tolist() for batch in batches] == [[pytest.approx(4 / 3), 0], [pytest.approx(4 / 3)] * 2]


def test_balance_leaves_full_and_empty_batches_alone() -> None:
    for weight in (torch.ones(4), torch.zeros(4)):
        batch = {"weight": weight}
        balance([batch], 4)
        assert batch["weight"] is weight


def test_means_over_balanced_batches_are_means_over_samples() -> None:
    """Two global batches of two micro-batches; the second has three empty slots of four."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 99.0, 99.0, 99.0])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    means = Means()
    for start in (0, 4):
        batches = [{"value": values[at : at + 2], "weight": weights[at : at + 2]} for at in range(start, start + 4, 2)]
        [samples] = balance(batches, 4)
        for batch in batches:
            mean = (batch["value"] * batch["weight"]).mean()
            means.add(Losses(mean, {"twice": 2 * mean, "constant": torch.tensor(7.0)}), samples, prefix="net/")
    assert means.close() == pytest.approx({"net/loss": 4.0, "net/twice": 8.0, "net/constant": 7.0})
    assert means.close() == {}


def test_a_term_that_is_not_always_there_is_averaged_where_it_is() -> None:
    means = Means()
    means.add(Losses(torch.tensor(1.0)))
    means.add(Losses(torch.tensor(3.0), {"rare": torch.tensor(5.0)}))
    assert means.close() == {"loss": 2.0, "rare": 5.0}
