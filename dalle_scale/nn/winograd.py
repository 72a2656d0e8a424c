"""3x3 convolutions on CPUs by Winograd's minimal filtering F(4x4, 3x3) (arXiv 1509.09308, Sec. 4.1): 36 products where
the definition has 144.

A tile of 4x4 results needs 6x6 values. In one dimension the 4 results are A^T ((G filter) * (B^T values)), `*` element
by element; in two dimensions each matrix is applied along rows and along columns. What remains is a sum over channels
for each of the 36 places, which is one batched matrix product; its gradients have the same form.

Maps are channels-last, so that tiles are copied in runs of channels. Rounding errors in fp32 are 2e-6 of the spread of
the results; those of torch's own convolutions are 0.2e-6 to 0.9e-6, by CPU. Libraries for GPUs have their own version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_TILE, _WINDOW = 4, 6
_FEWEST_TILES = 32  # of a batch; below, transforming filters costs more than the products that it saves
_FEWEST_CHANNELS = 64  # below, transforming maps does
_BLOCK_VALUES = 2**19  # transformed values at a time: they should stay in the cache; but no fewer than of the filters


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution that keeps the size, by Winograd where that is faster. Differentiable once.

    Args:
        x: [B, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O], or [B, O]: one for each sample.

    Returns:
        [B, O, H, W].
    """
    if _pays(x, weight):
        out: Tensor = _Winograd.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return plain_conv(x, weight, bias)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's convolution that keeps the size; bias [O], or [B, O]: one for each sample."""
    padding = weight.shape[2] // 2
    if bias.ndim == 1:
        return F.conv2d(x, weight, bias, padding=padding)
    return F.conv2d(x, weight, padding=padding).add_(bias[:, :, None, None])


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether Winograd is the faster way."""
    count, _, height, width = x.shape
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and height % _TILE == width % _TILE == 0
        and count * height * width >= _FEWEST_TILES * _TILE**2
        and min(weight.shape[:2]) >= _FEWEST_CHANNELS
    )


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dimensions = bias.ndim
        return _convolve(x, _filters(weight).transpose(1, 2), bias)

    @staticmethod
    @once_differentiable
    # its caller may be in autocast, of which torch's own knows nothing backwards
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        [grad] = grads
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _convolve(grad, _filters(weight, flipped=True)) if of_x else None,
            _weight_gradient(x, grad) if of_weight else None,
            grad.sum(dim=(2, 3) if ctx.bias_dimensions == 2 else (0, 2, 3)) if of_bias else None,
        )


def _convolve(x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, C, H, W] and transformed filters [36, C, O] -> [B, O, H, W]."""
    maps = _channels_last(x)
    shape = (len(x), filters.shape[2], *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    out_tiles = _tiles(out.permute(0, 2, 3, 1))
    after = _matrix(_A, maps)
    for samples, rows in _blocks(maps, filters.numel()):
        products = torch.bmm(_windows(maps, samples, rows), filters).view(_WINDOW, _WINDOW, -1)
        into = out_tiles[samples, rows]
        tiles = _both_ways(after, products).view(_TILE, _TILE, *into.shape[:2], *into.shape[3::2])
        tiles = tiles.permute(2, 3, 0, 4, 1, 5)
        if bias is None:
            into.copy_(tiles)
        else:
            torch.add(tiles, bias if bias.ndim == 1 else bias[samples, None, None, None, None], out=into)
    return out


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """[B, C, H, W] and [B, O, H, W] -> [O, C, 3, 3]."""
    maps, slopes = _channels_last(x), _channels_last(grad)
    before = _matrix(_A, maps).t().contiguous()
    total: Tensor | None = None  # [36, O, C]
    tiles = _tiles(slopes).permute(2, 4, 0, 1, 3, 5)
    for samples, rows in _blocks(maps, _WINDOW**2 * slopes.shape[3] * maps.shape[3]):
        part = tiles[:, :, samples, rows]
        spread = _both_ways(before, part.reshape(_TILE, _TILE, -1)).view(_WINDOW**2, -1, slopes.shape[3])
        factors = spread.transpose(1, 2), _windows(maps, samples, rows)
        total = torch.bmm(*factors) if total is None else total.baddbmm_(*factors)
    assert total is not None
    matrix = _matrix(_G, maps).t()
    weight = torch.kron(matrix, matrix) @ total.flatten(1)
    return weight.t().reshape(slopes.shape[3], maps.shape[3], 3, 3)


def _filters(weight: Tensor, flipped: bool = False) -> Tensor:
    """[O, C, 3, 3] -> [36, O, C]. Flipped: of the filters turned by half a circle, as gradients of maps take them."""
    matrix = _matrix(_G, weight)
    matrix = matrix.flip(1) if flipped else matrix
    return (torch.kron(matrix, matrix) @ weight.reshape(-1, 9).t()).view(_WINDOW**2, *weight.shape[:2])


def _tiles(maps: Tensor) -> Tensor:
    """[B, H, W, C] as [B, H / 4, 4, W / 4, 4, C]."""
    tiles: Tensor = maps.unflatten(2, (-1, _TILE)).unflatten(1, (-1, _TILE))
    return tiles


def _windows(maps: Tensor, samples: slice, rows: slice) -> Tensor:
    """Transformed windows of some tiles of [B, H, W, C]: [36, tiles, C]."""
    first, end = rows.start * _TILE, rows.stop * _TILE
    part = maps[samples, max(first - 1, 0) : end + 1]
    part = F.pad(part, (0, 0, 1, 1, int(first == 0), int(end == maps.shape[1])))
    windows = part.unfold(1, _WINDOW, _TILE).unfold(2, _WINDOW, _TILE).permute(4, 5, 0, 1, 2, 3)
    transformed = _both_ways(_matrix(_B, maps), windows.reshape(_WINDOW, _WINDOW, -1))
    return transformed.view(_WINDOW**2, -1, maps.shape[3])


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix` [m, k] along the rows and the columns of tiles [k, k, N] -> [m, m, N]."""
    return torch.matmul(matrix, (matrix @ tiles.flatten(1)).view(len(matrix), len(tiles), -1))


def _blocks(maps: Tensor, filter_values: int) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of tiles of [B, H, W, C] to work on at a time, for transformed filters of some size."""
    count, rows = len(maps), maps.shape[1] // _TILE
    row_values = maps[0, :_TILE].numel() * _WINDOW**2 // _TILE**2
    fitting = max(1, max(_BLOCK_VALUES, filter_values) // row_values)
    samples = max(1, fitting // rows)
    for first in range(0, count, samples):
        for row in range(0, rows, min(rows, fitting)):
            yield slice(first, min(first + samples, count)), slice(row, min(row + fitting, rows))


def _channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] -> contiguous [B, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def _matrix(rows: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype)
