"""The transforms of nn/winograd_transforms.py as sums over the matrices, in any dtype: the test's oracle.
With `absolute`, the same sums of absolute values, which bound the rounding errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn import winograd
from dalle_scale.nn.winograd_transforms import Block


class Reference:
    """Functions of the names and arguments of the module's."""

    def __init__(self, absolute: bool) -> None:
        matrices = (torch.tensor(rows, dtype=torch.float64) for rows in (winograd._A, winograd._B, winograd._G))
        self.a, self.b, self.g = (matrix.abs() if absolute else matrix for matrix in matrices)

    def take_windows(self, maps: Tensor, block: Block, width: int, relu: bool, name: str) -> Tensor:
        maps = F.pad(maps.relu() if relu else maps, (0, width - maps.shape[3], 1, 1, 1, 1))
        windows = maps.unfold(1, 6, 4).unfold(2, 6, 4)[block.samples, block.rows]  # [n, r, c, C, 6, 6]
        return torch.einsum("ia,jb,nrcwab->jinrcw", self.b, self.b, windows).reshape(36, -1, width)

    def take_tiles(self, maps: Tensor, block: Block, width: int, relu: bool, name: str) -> Tensor:
        maps = F.pad(maps.relu() if relu else maps, (0, width - maps.shape[3]))
        tiles = maps.unfold(1, 4, 4).unfold(2, 4, 4)[block.samples, block.rows]
        return torch.einsum("ai,bj,nrcwab->jinrcw", self.a, self.a, tiles).reshape(36, -1, width)

    def take_filters(self, weight: Tensor, width: int, flipped: bool) -> Tensor:
        weight = F.pad(weight.flip(2, 3) if flipped else weight, (0, 0, 0, 0, 0, width - weight.shape[1]))
        return torch.einsum("ia,jb,owab->jiow", self.g, self.g, weight).reshape(36, -1, width)

    def put_filters(self, places: Tensor, columns: int, flipped: bool) -> Tensor:
        found = torch.einsum("ia,jb,jiow->owab", self.g, self.g, places.unflatten(0, (6, 6)))[:, :columns]
        return found.flip(2, 3) if flipped else found

    def put_tiles(
        self, products: Tensor, out: Tensor, block: Block, bias: Tensor | None, add: Tensor | None, mask: Tensor | None
    ) -> None:
        tiles = self._tiles(products, out, block)
        found = torch.einsum("ai,bj,jinrcw->nracbw", self.a, self.a, tiles).flatten(3, 4).flatten(1, 2)
        rows = slice(4 * block.rows.start, 4 * block.rows.stop)
        found = ended(found, bias, add, block.samples, rows)
        out[block.samples, rows] = found if mask is None else found * (mask[block.samples, rows] > 0)

    def put_windows(
        self,
        products: Tensor,
        out: Tensor,
        block: Block,
        below: Tensor,
        bias: Tensor | None,
        add: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Windows reach one row above the block, which they complete, and one below it, which the next completes."""
        windows = torch.einsum("ia,jb,jinrcw->nrcabw", self.b, self.b, self._tiles(products, out, block))
        first, end = 4 * block.rows.start, 4 * block.rows.stop
        framed = out.new_zeros(block.count, end - first + 2, out.shape[2] + 2, out.shape[3])
        for row in range(windows.shape[1]):
            for column in range(windows.shape[2]):
                framed[:, 4 * row : 4 * row + 6, 4 * column : 4 * column + 6] += windows[:, row, column]
        framed = framed[:, :, 1:-1]
        inside = ended(framed[:, 1:-1], bias, add, block.samples, slice(first, end))
        if first:
            inside[:, 0] += below
            out[block.samples, first - 1] += framed[:, 0]
        out[block.samples, first:end] = inside
        below.copy_(framed[:, -1])
        if mask is not None:
            changed = slice(max(0, first - 1), end)
            out[block.samples, changed] *= mask[block.samples, changed] > 0

    def put_rows(
        self, products: Tensor, out: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor | None
    ) -> None:
        found = products[:, : out.shape[1]] + (0 if bias is None else bias) + (0 if add is None else add)
        out.copy_(found if mask is None else found * (mask > 0))

    def _tiles(self, products: Tensor, out: Tensor, block: Block) -> Tensor:
        """Places [36, tiles, width] as [6, 6, samples, rows, columns, O]: by column and row of the window."""
        rows = block.rows.stop - block.rows.start
        return products.view(6, 6, block.count, rows, out.shape[2] // 4, -1)[..., : out.shape[3]]


def ended(found: Tensor, bias: Tensor | None, add: Tensor | None, samples: slice, rows: slice) -> Tensor:
    """With what is added at the end."""
    if bias is not None:
        found = found + (bias if bias.ndim == 1 else bias[samples, None, None])
    return found if add is None else found + add[samples, rows]
