"""3x3 convolutions on CPUs by Winograd's minimal filtering as in nn/winograd.py, for maps of few channels on one side.

In one dimension 4 results of a window of 6 values are A^T ((G filter) * (B^T values)). Read from right to left it is
the transposed convolution: what 4 values add to the 6 results around them is B ((G filter) * (A values)), with the
filter turned around. So each convolution can be done in two ways, and each way is the other's gradient: it takes
windows of the input apart and puts tiles of the output down, or takes tiles of the input apart and adds windows of the
output up. Tiles do not overlap and are the cheaper side: they are the side with more channels. Gradients of maps and of
weights share what is taken apart.

Maps are channels-last. Rounding errors in fp32 are 1e-6 to 3e-6 of the spread of the results; those of torch's own
convolutions are 0.1e-6 to 1e-6, by CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dalle_scale.nn.winograd_transforms import (
    TILE,
    WINDOW,
    Block,
    put_filters,
    put_tiles,
    put_windows,
    take_filters,
    take_tiles,
    take_windows,
    workspace,
)

_FEWEST_CHANNELS = 20  # below, transforming maps does
_ODD_WIDTHS = 64  # results narrower than this are computed much faster when their width is a multiple of 8
_BLOCK_VALUES = 2**19  # transformed values at a time: they should stay in the cache
_BLOCK_TILES = 128  # but no fewer than make the products of a place worth while


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether maps x [B, C, H, W] are of whole tiles and have channels enough."""
    return x.shape[2] % TILE == x.shape[3] % TILE == 0 and min(weight.shape[:2]) >= _FEWEST_CHANNELS


def forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None, out: Tensor) -> None:
    """Convolution that keeps the size.

    Args:
        x: contiguous [B, H, W, C].
        weight: [O, C, 3, 3].
        bias: [O], or [B, O]: one for each sample.
        relu: convolve relu(x).
        residual: contiguous [B, H, W, O], added.
        out: contiguous [B, H, W, O], written.
    """
    by_windows = len(weight) >= weight.shape[1]
    filters = take_filters(weight.transpose(0, 1), padded(len(weight)), flipped=not by_windows)  # [36, C, O]
    take = take_windows if by_windows else take_tiles
    blocks = _blocks(x, filters)
    below = _below(out, blocks)
    for block in blocks:
        products = _multiplied(take(x, block, filters.shape[1], relu, "first"), filters)
        if by_windows:
            put_tiles(products, out, block, bias, add=residual)
        else:
            put_windows(products, out, block, below[: block.count], bias, add=residual)


def backward(
    x: Tensor, weight: Tensor, grad: Tensor, relu: bool, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight as in `forward`, given that of its result [B, H, W, O]."""
    by_windows = len(weight) >= weight.shape[1]
    filters = take_filters(weight, padded(weight.shape[1]), flipped=not by_windows)  # [36, O, C]
    slopes = torch.empty_like(x) if of_x else None
    total: Tensor | None = None  # [36, O, C]
    take, take_spread = (take_windows, take_tiles) if by_windows else (take_tiles, take_windows)
    blocks = _blocks(x, filters)
    below = _below(x, blocks)
    for block in blocks:
        spread = take_spread(grad, block, filters.shape[1], False, "first")
        if of_weight:
            factors = spread.transpose(1, 2), take(x, block, filters.shape[2], relu, "second")
            total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
        if slopes is None:
            continue
        products, where_positive = _multiplied(spread, filters), x if relu else None
        if by_windows:
            put_windows(products, slopes, block, below[: block.count], where_positive=where_positive)
        else:
            put_tiles(products, slopes, block, where_positive=where_positive)
    return slopes, None if total is None else put_filters(total, weight.shape[1], flipped=not by_windows)


def _multiplied(places: Tensor, filters: Tensor) -> Tensor:
    """Their matrix products, in the workspace "second"."""
    return torch.bmm(places, filters, out=workspace("second", (*places.shape[:2], filters.shape[2]), places))


def _below(maps: Tensor, blocks: list[Block]) -> Tensor:
    """Room for what each block adds to the row below it; the first has the most samples."""
    return maps.new_empty(blocks[0].count, *maps.shape[2:])


def _blocks(maps: Tensor, filters: Tensor) -> list[Block]:
    """Blocks of [B, H, W, C], in order, for transformed filters [36, ., .]."""
    count, rows, columns = len(maps), maps.shape[1] // TILE, maps.shape[2] // TILE
    tiles = max(_BLOCK_TILES, _BLOCK_VALUES // (WINDOW**2 * max(filters.shape[1:])))
    fitting = max(1, tiles // columns)
    samples, parts = max(1, fitting // rows), -(-rows // fitting)
    edges = [rows * part // parts for part in range(parts + 1)]
    starts = range(0, count, samples)
    return [Block(slice(at, min(at + samples, count)), slice(*part)) for at in starts for part in pairwise(edges)]


def padded(width: int) -> int:
    """Columns that a matrix of so many should have."""
    return width if width >= _ODD_WIDTHS else -(-width // 8) * 8
