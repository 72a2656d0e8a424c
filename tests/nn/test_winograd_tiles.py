"""Convolutions by tiles and windows against torch's: values and gradients, whatever is worked on at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn import winograd_tiles, winograd_transforms

SHAPES = [(2, 5, 8, 12, 3), (3, 4, 16, 8, 7), (1, 1, 4, 4, 1), (2, 3, 12, 8, 66)]  # B, C, H, W, O: fewer and more


pytestmark = pytest.mark.skipif(not winograd_transforms.available(), reason="no C compiler")


def arguments(shape: tuple[int, ...], bias_of: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    count, channels, height, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(count, channels, height, width), (outputs, channels, 3, 3)]
    sizes += [(outputs,) if bias_of == "all" else (count, outputs), (count, outputs, height, width)]
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


def plain(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
    out = F.conv2d(F.relu(x) if relu else x, weight, padding=1) + bias[..., None, None]
    return out if residual is None else out + residual


def forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    out = torch.empty(*x.shape[:3], len(weight), dtype=x.dtype)
    winograd_tiles.forward(x, weight, bias, relu, residual, out)
    return out


def rows(maps: Tensor) -> Tensor:
    return maps.detach().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias_of", ["all", "each"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_values", [1, 600, 2000, 2**19])
def test_values_and_gradients(
    block_values: int, shape: tuple[int, ...], bias_of: str, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd_tiles, "_BLOCK_VALUES", block_values)
    monkeypatch.setattr(winograd_tiles, "_BLOCK_TILES", 1)
    x, weight, bias, residual = arguments(shape, bias_of)
    for added in (None, residual):
        expected = plain(x, weight, bias, relu, added)
        found = forward(rows(x), weight.detach(), bias.detach(), relu, None if added is None else rows(added))
        torch.testing.assert_close(found, rows(expected))
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, weight), upstream)
    of_x, of_weight = winograd_tiles.backward(rows(x), weight.detach(), rows(upstream), relu, True, True)
    assert of_x is not None and of_weight is not None
    torch.testing.assert_close(of_x, rows(wanted[0]))
    torch.testing.assert_close(of_weight, wanted[1])


def test_blocks_hold_every_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, filters = torch.zeros(3, 24, 8, 5), torch.zeros(36, 5, 1)
    monkeypatch.setattr(winograd_tiles, "_BLOCK_TILES", 1)
    row_values = 36 * 2 * 5  # 2 tiles of 5 channels
    for rows_at_a_time, blocks in ((1, 18), (4, 6), (5, 6), (6, 3), (13, 2), (18, 1), (100, 1)):
        monkeypatch.setattr(winograd_tiles, "_BLOCK_VALUES", rows_at_a_time * row_values)
        covered = torch.zeros(3, 6)
        found = list(winograd_tiles._blocks(maps, filters))
        for block in found:
            covered[block.samples, block.rows] += 1
        assert bool((covered == 1).all()) and len(found) == blocks
        assert all(later.rows.start in (0, block.rows.stop) for block, later in pairwise(found))
    monkeypatch.setattr(winograd_tiles, "_BLOCK_TILES", 11)  # 5 rows
    monkeypatch.setattr(winograd_tiles, "_BLOCK_VALUES", 1)
    assert len(list(winograd_tiles._blocks(maps, filters))) == 6


def test_only_what_is_asked_for_has_a_gradient() -> None:
    x, weight, _, upstream = arguments(SHAPES[0], "all")
    both = winograd_tiles.backward(rows(x), weight.detach(), rows(upstream), True, True, True)
    for of_x, of_weight in ((True, False), (False, True)):
        found = winograd_tiles.backward(rows(x), weight.detach(), rows(upstream), True, of_x, of_weight)
        for asked, gradient, wanted in zip((of_x, of_weight), found, both, strict=True):
            assert (gradient is not None) == asked
            assert gradient is None or torch.equal(gradient, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "outputs"), [(256, 256), (256, 64)])
def test_rounding_errors(channels: int, outputs: int) -> None:
    """As small as the module says, for wide layers in both ways. Those of torch depend on the CPU: no bound."""
    x, weight, bias, upstream = (t.detach() for t in arguments((2, channels, 32, 32, outputs), "all", torch.float32))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    out = plain(*exact)
    wanted = [rows(out), *torch.autograd.grad(out, exact[:2], upstream.double())]
    of_x, of_weight = winograd_tiles.backward(rows(x), weight, rows(upstream), False, True, True)
    assert of_x is not None and of_weight is not None
    found = [forward(rows(x), weight, bias, False, None), of_x.permute(0, 3, 1, 2), of_weight]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).square().mean().sqrt() / theirs.std() < 6e-6
