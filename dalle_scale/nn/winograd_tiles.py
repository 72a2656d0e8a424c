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

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn.winograd import _A, _B, _G

_SUM = 7  # the place of the 36 that adds alike to all 16 results of a tile
_TILE, _WINDOW = 4, 6
_FEWEST_CHANNELS = 20  # below, transforming maps does
_ODD_WIDTHS = 64  # matrices narrower than this are multiplied much faster when their width is a multiple of 8
_BLOCK_VALUES = 2**19  # transformed values at a time: they should stay in the cache
_BLOCK_TILES = 128  # but no fewer than make the products of a place worth while


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether maps x [B, C, H, W] are of whole tiles and have channels enough."""
    return x.shape[2] % _TILE == x.shape[3] % _TILE == 0 and min(weight.shape[:2]) >= _FEWEST_CHANNELS


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
    filters = _filters(weight.transpose(0, 1), flipped=not by_windows)  # [36, C, O]
    below = None
    for block in _blocks(x, filters):
        if by_windows:
            products = torch.bmm(_windows(x, block, filters.shape[1], relu), filters)
            sums = products[_SUM, :, : len(weight)].view(block.count, -1, len(weight))
            sums.add_(bias if bias.ndim == 1 else bias[block.samples, None])
            _put_tiles(products, out, block, add=residual)
        else:
            products = torch.bmm(_tiles(x, block, filters.shape[1], relu), filters)
            below = _put_windows(products, out, block, below)
    if not by_windows:
        out.add_(bias if bias.ndim == 1 else bias[:, None, None])
        if residual is not None:
            out.add_(residual)


def backward(
    x: Tensor, weight: Tensor, grad: Tensor, relu: bool, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight as in `forward`, given that of its result [B, H, W, O]."""
    by_windows = len(weight) >= weight.shape[1]
    filters = _filters(weight, flipped=not by_windows)  # [36, O, C]
    slopes = torch.empty_like(x) if of_x else None
    total: Tensor | None = None  # [36, O, C]
    apart, put_together = (_windows, _tiles) if by_windows else (_tiles, _windows)
    below = None
    for block in _blocks(x, filters):
        spread = put_together(grad, block, filters.shape[1], False)
        if of_weight:
            factors = spread.transpose(1, 2), apart(x, block, filters.shape[2], relu)
            total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
        if slopes is not None and by_windows:
            below = _put_windows(torch.bmm(spread, filters), slopes, block, below)
        elif slopes is not None:
            _put_tiles(torch.bmm(spread, filters), slopes, block, where_positive=x if relu else None)
    if slopes is not None and by_windows and relu:
        keep_where_positive(slopes, x, slopes)
    return slopes, None if total is None else _weight_gradient(total, weight, flipped=not by_windows)


class _Block(NamedTuple):
    """Samples and rows of tiles that are worked on at a time."""

    samples: slice
    rows: slice

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.samples.stop - self.samples.start)

    def tiles_of(self, maps: Tensor) -> Tensor:
        """[B, H, W, C] -> [samples, rows, 4, W / 4, 4, C]."""
        return maps[self.samples].unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))[:, self.rows]


def _blocks(maps: Tensor, filters: Tensor) -> Iterator[_Block]:
    """Blocks of [B, H, W, C], in order, for transformed filters [36, ., .]."""
    count, rows, columns = len(maps), maps.shape[1] // _TILE, maps.shape[2] // _TILE
    tiles = max(_BLOCK_TILES, _BLOCK_VALUES // (_WINDOW**2 * max(filters.shape[1:])))
    fitting = max(1, tiles // columns)
    samples, parts = max(1, fitting // rows), -(-rows // fitting)
    edges = [rows * part // parts for part in range(parts + 1)]
    for first in range(0, count, samples):
        for start, end in pairwise(edges):
            yield _Block(slice(first, min(first + samples, count)), slice(start, end))


# --- taking maps apart ------------------------------------------------------------------------------------------------


def _windows(maps: Tensor, block: _Block, width: int, relu: bool) -> Tensor:
    """B^T of the windows of a block of [B, H, W, C], or of its relu, with zeros up to `width` channels:
    [36, tiles, width]."""
    channels = maps.shape[3]
    first, end = block.rows.start * _TILE, block.rows.stop * _TILE
    at_top, at_end = int(first == 0), int(end == maps.shape[1])
    part = maps[block.samples, first - 1 + at_top : end + 1 - at_end]
    framed = maps.new_empty(block.count, end - first + 2, maps.shape[2] + 2, width)
    for border in (framed[:, :at_top], framed[:, end - first + 2 - at_end :], framed[:, :, :1], framed[:, :, -1:]):
        border.zero_()
    framed[..., channels:].zero_()
    _copy(part, framed[:, at_top : end - first + 2 - at_end, 1:-1, :channels], relu)
    matrix = _matrix(_B, maps)
    rows = framed.unfold(1, _WINDOW, _TILE).permute(4, 0, 1, 2, 3)
    columns = (matrix @ rows.reshape(_WINDOW, -1)).view(rows.shape)
    windows = columns.unfold(3, _WINDOW, _TILE).permute(5, 0, 1, 2, 3, 4)
    return (matrix @ windows.reshape(_WINDOW, -1)).view(_WINDOW**2, -1, width)


def _tiles(maps: Tensor, block: _Block, width: int, relu: bool) -> Tensor:
    """A of the tiles of a block of [B, H, W, C], or of its relu, with zeros up to `width` channels:
    [36, tiles, width]."""
    part = block.tiles_of(maps).permute(4, 2, 0, 1, 3, 5)
    tiles = maps.new_empty(*part.shape[:5], width)
    tiles[..., part.shape[5] :].zero_()
    _copy(part, tiles[..., : part.shape[5]], relu)
    return _both_ways(_matrix(_A, maps).t().contiguous(), tiles).view(_WINDOW**2, -1, width)


def _copy(values: Tensor, into: Tensor, relu: bool) -> None:
    if relu:
        torch.clamp_min(values, 0, out=into)
    else:
        into.copy_(values)


# --- putting maps together --------------------------------------------------------------------------------------------


def _put_tiles(
    products: Tensor, out: Tensor, block: _Block, add: Tensor | None = None, where_positive: Tensor | None = None
) -> None:
    """Writes A^T of products [36, tiles, width] into the tiles of a block of `out` [B, H, W, O]: with `add`, of the
    same shape, added; with 0 where `where_positive` is not positive."""
    into = block.tiles_of(out)
    tiles = _both_ways(_matrix(_A, out), products).view(_TILE, _TILE, *into.shape[:2], into.shape[3], -1)
    tiles = tiles[..., : out.shape[3]].permute(2, 3, 1, 4, 0, 5)
    if where_positive is not None:
        keep_where_positive(tiles, block.tiles_of(where_positive), into)
    elif add is not None:
        torch.add(tiles, block.tiles_of(add), out=into)
    else:
        into.copy_(tiles)


def _put_windows(products: Tensor, out: Tensor, block: _Block, below: Tensor | None) -> Tensor:
    """Adds B of products [36, tiles, width] up in a block of `out` [B, H, W, O].

    Args:
        below: what the block before returned: what its last row of tiles adds to the row below it.

    Returns:
        What this block adds to the row below it.
    """
    [*_, width], channels = products.shape, out.shape[3]
    tile_rows, columns = block.rows.stop - block.rows.start, out.shape[2] // _TILE
    matrix = _matrix(_B, out).t().contiguous()
    windows = (matrix @ products.view(_WINDOW, -1)).view(_WINDOW, _WINDOW, block.count, tile_rows, columns, width)
    windows = windows.permute(2, 3, 1, 4, 0, 5)  # a window begins one value before its tile and ends one after it
    tiles = windows[..., 1:5, :].contiguous()
    tiles[..., :-1, 3, :] += windows[..., 1:, 0, :]
    tiles[..., 1:, 0, :] += windows[..., :-1, 5, :]
    tiles = tiles.view(-1, _WINDOW, columns * _TILE * width)
    rows = torch.bmm(matrix.expand(len(tiles), _WINDOW, _WINDOW), tiles)
    rows = rows.view(block.count, tile_rows, _WINDOW, -1, width)[..., :channels]
    all_rows = out[block.samples].unflatten(1, (-1, _TILE))
    into = all_rows[:, block.rows]
    into.copy_(rows[:, :, 1:5])
    into[:, :-1, 3] += rows[:, 1:, 0]
    into[:, 1:, 0] += rows[:, :-1, 5]
    if block.rows.start:
        assert below is not None
        all_rows[:, block.rows.start - 1, 3] += rows[:, 0, 0]
        into[:, 0, 0] += below
    return rows[:, -1, 5]


def keep_where_positive(values: Tensor, where: Tensor, into: Tensor) -> None:
    """Writes `values`, and 0 where `where` is not positive, into a tensor that may be one of them: relu's gradient."""
    torch.ops.aten.threshold_backward.grad_input(values, where, 0, grad_input=into)


# --- filters and matrices ---------------------------------------------------------------------------------------------


def _filters(weight: Tensor, flipped: bool) -> Tensor:
    """[O, C, 3, 3] -> [36, O, C], with zeros up to widths that multiply fast. Flipped: turned by half a circle."""
    shape = [padded(width) for width in weight.shape[:2]]
    if shape != list(weight.shape[:2]):
        weight = F.pad(weight, (0, 0, 0, 0, 0, shape[1] - weight.shape[1], 0, shape[0] - weight.shape[0]))
    return (_filter_matrix(weight, flipped) @ weight.reshape(-1, 9).t()).view(_WINDOW**2, *shape)


def _weight_gradient(total: Tensor, weight: Tensor, flipped: bool) -> Tensor:
    """The gradient of a weight [O, C, 3, 3], given that of `_filters`."""
    rows = (_filter_matrix(weight, flipped).t() @ total.flatten(1)).view(9, *total.shape[1:])
    return rows[:, : len(weight), : weight.shape[1]].permute(1, 2, 0).reshape(weight.shape)


def _filter_matrix(like: Tensor, flipped: bool) -> Tensor:
    """[36, 9]; places are numbered column by column, values of filters row by row."""
    matrix = _matrix(_G, like)
    matrix = matrix.flip(1) if flipped else matrix
    both = torch.kron(matrix, matrix).view(-1, 3, 3)
    return both.transpose(1, 2).reshape(-1, 9)


def padded(width: int) -> int:
    """Columns that a matrix of so many should have."""
    return width if width >= _ODD_WIDTHS else -(-width // 8) * 8


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix` [m, k] along the columns and the rows of tiles [k * k * N values] -> [m, m, N]."""
    size, places = matrix.shape
    half = (matrix @ tiles.view(places, -1)).view(size, places, -1)
    return torch.bmm(matrix.expand(size, size, places), half)


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype)
