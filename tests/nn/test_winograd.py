"""Convolutions by Winograd against torch's: values and all gradients, whatever is worked on at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn import winograd
from dalle_scale.nn.winograd import conv3x3

SHAPES = [(2, 5, 8, 12, 3), (3, 4, 16, 8, 7), (1, 1, 4, 4, 1)]  # B, C, H, W, O


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_FEWEST_TILES", 1)
    monkeypatch.setattr(winograd, "_FEWEST_CHANNELS", 1)


def arguments(shape: tuple[int, ...], bias_of: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    count, channels, height, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(count, channels, height, width), (outputs, channels, 3, 3)]
    sizes.append((outputs,) if bias_of == "all" else (count, outputs))
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1) + bias[..., None, None]


def by_winograd(y: Tensor) -> bool:
    return y.grad_fn is not None and "Winograd" in y.grad_fn.name()


@pytest.mark.parametrize("bias_of", ["all", "each"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_values", [1, 600, 2000, 2**19])
def test_values_and_gradients(
    block_values: int, shape: tuple[int, ...], bias_of: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_BLOCK_VALUES", block_values)
    x, weight, bias = arguments(shape, bias_of)
    ours, expected = conv3x3(x, weight, bias), plain(x, weight, bias)
    assert by_winograd(ours) and ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn_like(expected)
    of_ours, of_plain = (torch.autograd.grad(y, (x, weight, bias), upstream) for y in (ours, expected))
    for found, wanted in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(found, wanted)


def test_blocks_hold_every_tile_once(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.zeros(3, 24, 8, 5)
    row_values = 36 * 2 * 5  # 2 tiles of 5 channels
    for rows_at_a_time, blocks in ((1, 18), (4, 6), (5, 6), (6, 3), (13, 2), (18, 1), (100, 1)):
        monkeypatch.setattr(winograd, "_BLOCK_VALUES", rows_at_a_time * row_values)
        covered = torch.zeros(3, 6)
        found = list(winograd._blocks(maps, filter_values=0))
        for samples, rows in found:
            covered[samples, rows] += 1
        assert bool((covered == 1).all()) and len(found) == blocks
    assert len(list(winograd._blocks(maps, filter_values=18 * row_values))) == 1


def test_only_what_is_asked_for_has_a_gradient(always: None) -> None:
    x, weight, bias = arguments(SHAPES[0], "all")
    wanted = torch.autograd.grad(plain(x, weight, bias).square().sum(), weight)[0]
    found = conv3x3(x.detach(), weight, bias.detach())
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), weight)[0], wanted)
    assert torch.autograd.gradcheck(conv3x3, (x, weight, bias), fast_mode=True)


def test_rounding_errors() -> None:
    """No larger than where sums add one number after the other, the worst order. Those of torch: no bound."""
    channels = 256
    x, weight, bias = (tensor.detach() for tensor in arguments((2, channels, 32, 32, 256), "all", torch.float32))
    exact = plain(x.double(), weight.double(), bias.double())
    error = (conv3x3(x, weight, bias) - exact).square().mean().sqrt() / exact.std()
    # A rounding is off by u / sqrt(3) of what it rounds (root mean square). Of n independent summands that is
    # n u / sqrt(6) of one of them in the end. Before and after, maps, filters and results go through two sums of six
    # products each, 22 roundings. The transforms make a result of more than it holds: of squares `amplified`.
    before, of_filters, after = (
        torch.tensor(rows, dtype=torch.float64).square() for rows in (winograd._B, winograd._G, winograd._A)
    )
    one_way = after @ (before.sum(dim=1) * of_filters.sum(dim=1))
    amplified = torch.outer(one_way, one_way).mean()
    squares = amplified * (channels**2 / 6 + 3 * channels * 22 / 3) / (9 * channels)
    assert error < torch.finfo(torch.float32).eps / 2 * squares.sqrt()


def test_autocast() -> None:
    """Forwards torch's way, in its type; backwards as without."""
    x, weight, bias = arguments((2, 64, 16, 16, 64), "all", torch.float32)
    y = conv3x3(x, weight, bias).square().sum()
    expected = torch.autograd.grad(y, (x, weight, bias), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16
        found = torch.autograd.grad(y, (x, weight, bias))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((2, 64, 16, 16, 64), torch.float32, True),
        ((1, 64, 16, 16, 64), torch.float32, False),  # 16 tiles
        ((2, 64, 16, 18, 64), torch.float32, False),  # not of tiles
        ((2, 64, 16, 16, 3), torch.float32, False),  # few channels
        ((2, 64, 16, 16, 64), torch.bfloat16, False),
    ],
)
def test_where_it_is_taken(shape: tuple[int, ...], dtype: torch.dtype, taken: bool) -> None:
    for bias_of in ("all", "each"):
        x, weight, bias = arguments(shape, bias_of, dtype)
        y = conv3x3(x, weight, bias)
        assert by_winograd(y) == taken and y.dtype == dtype
        torch.testing.assert_close(y, plain(x, weight, bias), rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-3)
