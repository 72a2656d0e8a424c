"""Keys and values of the image states that one layer still looks back to, while samples are drawn code by code.

What a state sees lies together and in no order, because attention has none: reading it copies nothing. Memory is
allocated once, and holds zeros at first, because in the static form what is not there yet is multiplied by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_scale.models.transformer.masks import Kind, Layout

Seen = tuple[Tensor, Tensor | None]
"""Keys and values [2, rows, states, D], and which of them hold nothing yet, bool [states]; None where all hold one."""


class Lines:
    """The last states of the image, or of each column of it, each line in a ring."""

    def __init__(self, lines: int, slots: int) -> None:
        """lines: state i is one of line i % lines; slots: that a line keeps."""
        self.lines, self.slots = lines, slots
        self.states = lines * slots  # kept of a sample

    def begin(self, rows: int, like: Tensor) -> None:
        """Allocate. rows: samples times heads; like: has D, type and device."""
        self._room = like.new_zeros(self.lines, 2, rows, self.slots, like.shape[-1])
        self._places = torch.arange(self.slots, device=like.device)

    def add(self, newest: Tensor, index: int | Tensor) -> Seen:
        """Keep the key and the value of state `index`, [2, N, H, D] -> what it sees, itself included.

        With the index in a tensor, int64 [1], all shapes are the same at every state, as a CUDA graph wants them.
        """
        line, slot = index % self.lines, index // self.lines % self.slots
        if isinstance(index, int):
            room = self._room[line]
            _put(room, slot, newest)
            return room.narrow(2, 0, min(index // self.lines + 1, self.slots)), None
        self._room[line, :, :, slot] = newest.flatten(1, 2)
        room = self._room[0] if self.lines == 1 else self._room.index_select(0, line)[0]
        return room, self._places > index // self.lines


class Window:
    """A window of raster offsets: of `reach` rows back those from reach before to reach after, and the last reach + 1.

    From state to state each row back shows one state more and hides another. All that come into sight are of one
    column, so each column keeps its last `reach` states, and these replace, all at once, those that leave.
    """

    def __init__(self, grid: int, reach: int) -> None:
        """grid: above 2 reach, else the window has no gaps."""
        self.grid, self.reach, self.columns = grid, reach, 2 * reach + 1
        self.above = self.columns * reach  # states that are seen of the rows back
        self.states = grid * reach + self.above + reach + 1

    def begin(self, rows: int, like: Tensor) -> None:
        """See Lines."""
        self._waiting = like.new_zeros(self.grid, 2, rows, self.reach, like.shape[-1])
        self._seen = like.new_zeros(2, rows, self.above + self.reach + 1, like.shape[-1])
        self._columns, self._rows, self._own = (
            torch.arange(count, device=like.device) for count in (self.columns, self.reach, self.reach + 1)
        )

    def add(self, newest: Tensor, index: int | Tensor) -> Seen:
        """See Lines."""
        reach, ahead = self.reach, index + self.reach
        column, place = ahead % self.grid, ahead % self.columns * reach  # of those that come, in the seen
        own = self.above + index % (reach + 1)
        if isinstance(index, int):
            self._seen.narrow(2, place, reach).copy_(self._waiting[column])
            _put(self._seen, own, newest)
            _put(self._waiting[index % self.grid], index // self.grid % reach, newest)
            return self._seen, self._hidden(index) if index < reach * (self.grid + 1) else None
        self._seen[:, :, place + self._rows] = self._waiting.index_select(0, column)[0]
        self._seen[:, :, own] = newest.flatten(1, 2)[:, :, None]
        self._waiting[index % self.grid, :, :, index // self.grid % reach] = newest.flatten(1, 2)
        return self._seen, self._hidden(index)

    def _hidden(self, index: int | Tensor) -> Tensor:
        """Which of the seen hold nothing yet: bool [states]."""
        ahead = index + self.reach
        newest = ahead - (ahead - self._columns) % self.columns  # that came to each place; below 0, none did
        return torch.cat([(self._rows >= (newest // self.grid)[:, None]).flatten(), self._own > index])


def near_states(kind: Kind, layout: Layout) -> Lines | Window:
    """For a layer of this kind."""
    grid, reach = layout.grid, layout.conv_kernel // 2
    if kind == "conv" and 0 < 2 * reach < grid:
        return Window(grid, reach)
    if kind == "column":
        return Lines(grid, grid)
    slots = {"row": grid + 1, "conv": reach * (grid + 1) + 1}.get(kind, grid**2)
    return Lines(1, min(slots, grid**2))


def _put(room: Tensor, slot: int, newest: Tensor) -> None:
    """newest [2, N, H, D] into one slot of [2, N * H, slots, D]."""
    room.select(2, slot).view(newest.shape).copy_(newest)
