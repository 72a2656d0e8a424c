"""Masks of each kind of attention (arXiv 2102.12092, App. B.1).

The sequence is `prefix` states (start of text, caption, start of image) and then grid x grid image states in raster
order. Prefix states see the prefix up to themselves. Image states see the whole prefix and, of the image:

    full     every state up to themselves
    row      the last grid + 1 states in raster order, themselves included: up to the same column of the previous
             row, across row ends (figure 11a)
    column   their own column up to themselves (11b)
    conv     a conv_kernel x conv_kernel window around themselves, its past half; like the row window it is one of
             raster offsets, so it continues across row ends (11d)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["full", "row", "column", "conv"]


@dataclass(frozen=True)
class Layout:
    """Layout of a sequence: `prefix` states, then `grid` x `grid` image states in raster order."""

    prefix: int
    grid: int
    conv_kernel: int = 11  # side of the window of "conv" attention, odd

    @property
    def length(self) -> int:
        """Number of states."""
        return self.prefix + self.grid**2


def visible(kind: Kind, layout: Layout) -> Tensor:
    """Mask of the keys that each query sees: bool [L, L], row = query. Every query sees at least itself."""
    states = torch.arange(layout.length)
    query, key = states[:, None], states[None, :]
    offset = query - key  # between two image states: how far back in raster order
    if kind == "full":
        seen = torch.ones_like(offset, dtype=torch.bool)
    elif kind == "row":
        seen = offset <= layout.grid
    elif kind == "column":
        seen = offset % layout.grid == 0
    else:
        seen = torch.isin(offset, conv_offsets(layout))
    return (offset >= 0) & (seen | (key < layout.prefix))


def conv_offsets(layout: Layout) -> Tensor:
    """Raster offsets of the past half of the window; a window wider than the grid also holds offsets < 0, unused."""
    reach = layout.conv_kernel // 2
    rows_back = torch.arange(reach + 1)[:, None]
    columns_back = torch.arange(-reach, reach + 1)[None, :]
    return (rows_back * layout.grid + columns_back).flatten()
