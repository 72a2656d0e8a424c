"""The state machine of gradient scales (App. D of the paper), and what it makes of the optimizer's groups."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from dalle_scale.engine.scaling import Scaling
from dalle_scale.nn.residual_scaling import BranchScale

GROUPS = [{"branch": 0}, {"branch": 1}, {"branch": 1}, {"branch": -1}]
GOOD = [torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([12.0])]


def scaling(dynamic: bool = True, clip_norm: float = 0.0) -> Scaling:
    return Scaling([BranchScale(), BranchScale()], dynamic, clip_norm)


def update(one: Scaling, gradients: list[Tensor], groups: list[dict] | None = None) -> bool:
    """One step whose gradients have not yet been multiplied by the scales."""
    groups = GROUPS if groups is None else groups
    scaled = [gradient * one.of(group) for gradient, group in zip(gradients, groups, strict=True)]
    finite = one.finite(iter(zip(scaled, groups, strict=True)))
    return one.apply(groups, iter(zip(scaled, groups, strict=True)), finite, lambda tensor: tensor)


def broken(place: int, value: float = math.inf) -> list[Tensor]:
    return [torch.tensor([value]) if index == place else gradient for index, gradient in enumerate(GOOD)]


def test_growth_is_a_doubling_in_1000_updates():
    one = scaling()
    assert [scale.value for scale in one.scales] == [2**13, 2**13]
    for _ in range(1000):
        assert update(one, GOOD)
    for scale in one.scales:
        assert scale.value == pytest.approx(2**14)
    for _ in range(11_000):
        update(one, GOOD)
    assert [scale.value for scale in one.scales] == [2**24, 2**24]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_broken_branch_backs_off_alone_and_the_update_is_skipped(value):
    one = scaling()
    assert not update(one, broken(2, value))
    assert one.scales[0].value == pytest.approx(2**13 * 2**0.001)
    assert one.scales[1].value == pytest.approx(2**13 / 2**0.5)
    outside = scaling()
    assert not update(outside, broken(3, value))
    assert [scale.value for scale in outside.scales] == pytest.approx([2**13 * 2**0.001] * 2)


def test_no_two_divisions_within_125_updates():
    one = scaling()
    values = []
    for _ in range(251):
        update(one, broken(0))
        values.append(math.log2(one.scales[0].value))
    drops = [index for index in range(1, 251) if values[index] < values[index - 1]]
    assert values[0] == 12.5 and drops == [125, 250]


def test_the_lowest_scale():
    one = scaling()
    for _ in range(125 * 14):
        update(one, broken(0))
    assert one.scales[0].value == 2**7


def test_divisors_undo_scales_and_clip_the_norm():
    """The norm without scales is 13, whatever the scales are."""
    groups = [dict(group) for group in GROUPS]
    for dynamic in (True, False):
        one = scaling(dynamic, clip_norm=6.5)
        before = [one.of(group) for group in groups]
        assert update(one, GOOD, groups)
        assert [group["gradient_divisor"] for group in groups] == pytest.approx([2 * scale for scale in before])
        one = scaling(dynamic, clip_norm=14.0)
        assert update(one, GOOD, groups)
        assert [group["gradient_divisor"] for group in groups] == before


def test_bf16_has_no_scales():
    one = scaling(dynamic=False)
    assert not update(one, broken(1)) and one.numbers() == {}
    assert [scale.value for scale in one.scales] == [1.0, 1.0]


def test_state_goes_through_json():
    one, other = scaling(), scaling()
    for place in (0, 3, 1):
        update(one, broken(place))
    other.load(json.loads(json.dumps(one.state())))
    for _ in range(130):
        assert update(one, broken(0)) == update(other, broken(0))
    assert one.state() == other.state()
    assert one.numbers() == other.numbers() and one.numbers()["log2_scale_min"] < one.numbers()["log2_scale_max"]
