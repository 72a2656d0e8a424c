"""KV cache for autoregressive sampling: the keys and values of one attention layer, for samples decoded code by code.

`KVCache.prefill` computes and keeps the prefix (start of text, caption, start of image) once for each distinct caption;
`KVCache.decode_step` adds one image state of every sample and attends to all that it sees. Of the image a layer keeps
only the states that a later query can still see. They lie together and in no order, because attention has none, so
reading them copies nothing. Memory is allocated once, with zeros: in the form of fixed shapes, empty slots are
multiplied by 0.

Ring buffer: layers that see the last states (`row`), all of them (`full`), or those of their own column (`column`, one
ring for each column). A row layer of a 4 x 4 grid keeps grid + 1 = 5 states. When state 7 comes, it takes the slot of
state 2, which no later state sees:

    slot                    0    1    2    3    4
    before state 7          5    6    2    3    4
    visible to state 7      5    6    7    3    4

Sliding window: `conv` layers, which see, with a reach of r columns and rows, 2 r + 1 states of each of the r rows above
and the last r + 1 states of their own row. Here r = 1, the query is q, and w marks what waits until the window gets
there:

    row above       .  .  .  a  a  a  w  w  w
    own row         w  w  w  o  q

The next query sees one more column above (the w to the right of the a) and one less (the left a). So each column of the
grid keeps its last r states in `waiting`, and when the window reaches a column, these replace those of the column that
left it, all at once:

    visible   [ column 0 | column 1 | … | column 2 r ]  each of r states of the rows above, columns modulo 2 r + 1
              [ 0 | 1 | … | r ]                         the own row, states modulo r + 1
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from dalle_scale.models.transformer.masks import Kind, Layout
from dalle_scale.nn.half_on_cpu import attend_all

VisibleKeys: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Keys and values [2, N * H, states, D], and which of the states are still empty, bool [states]; None where none is."""


class KVCache:
    """Keys and values of one attention layer: a prefix for each distinct caption, the image of each sample."""

    def __init__(self, kind: Kind, layout: Layout, prefix_index: Tensor) -> None:
        """prefix_index: int64 [N], the row of the prefix batch that each sample continues; every row has a sample."""
        self.layout, self.prefix_index = layout, prefix_index
        self.image = image_buffer(kind, layout)
        counts = torch.bincount(prefix_index)
        order = prefix_index.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        samples = torch.arange(len(prefix_index), device=prefix_index.device)
        self._group_index = torch.empty_like(prefix_index)  # [N]: number of a sample among those of its prefix
        self._group_index[order] = samples - starts[prefix_index[order]]
        group_index = torch.arange(int(counts.max()), device=prefix_index.device) % counts[:, None]
        self._sample_index = order[starts[:, None] + group_index]  # [prefixes, largest group]; short rows repeat theirs
        self._in_order = torch.equal(self._sample_index.flatten(), samples)
        self._one_each = self._in_order and self._sample_index.shape[1] == 1
        self._prefix_keys = self._prefix_values = prefix_index.new_empty(0)  # until `prefill`

    def prefill(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the prefixes of the distinct captions, [captions, H, prefix, D] each, and return their attention, of the
        same shape."""
        captions, heads, prefix, width = key.shape
        assert prefix == self.layout.prefix
        self._prefix_keys = key.transpose(-1, -2).contiguous().view(captions * heads, width, prefix)
        self._prefix_values = value.contiguous().view(captions * heads, prefix, width)
        self.image.allocate(len(self.prefix_index) * heads, key)
        return attend_all(query, key, value, is_causal=True)

    def decode_step(self, states: Tensor, index: int | Tensor) -> Tensor:
        """Attention of image state `index` of each sample: query, key and value, [N, 3, H, D], the query already
        divided by sqrt(D) -> [N * H, 1, D].

        Few calls, because for one sample they take as long as the arithmetic; plain products, because for a single
        query they beat the fused kernel on CPUs. With the index in a tensor, int64 [1], all shapes are the same at
        every state, as a CUDA graph requires, and empty slots are masked.
        """
        width, prefix = states.shape[3], self.layout.prefix
        query, newest = states[:, 0].reshape(-1, 1, width), states[:, 1:].transpose(0, 1)
        visible, empty = self.image.append(newest, index)
        keys, values = visible.unbind()
        image = torch.bmm(query, keys.transpose(1, 2))
        if empty is not None:
            image = image.masked_fill(empty, -torch.inf)
        scores = torch.cat([self._times_prefix(query, self._prefix_keys), image], dim=-1)
        shares = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
        from_prefix = self._times_prefix(shares[..., :prefix], self._prefix_values)
        return torch.baddbmm(from_prefix, shares[..., prefix:], values)

    def _times_prefix(self, states: Tensor, prefix: Tensor) -> Tensor:
        """Products of [N * H, 1, A] with the kept matrix of each one's prefix, [prefixes * H, A, B] -> [N * H, 1, B]:
        one product reads a prefix for all its samples."""
        if self._one_each:
            return torch.bmm(states, prefix)
        by_sample = states.view(len(self.prefix_index), -1, states.shape[2])  # [N, H, A]
        shape = *self._sample_index.shape, *by_sample.shape[1:]
        grouped = by_sample.view(shape) if self._in_order else by_sample[self._sample_index]
        grouped = grouped.transpose(1, 2)  # [prefixes, H, largest group, A]
        product = torch.bmm(grouped.flatten(0, 1), prefix).view(*grouped.shape[:3], -1)
        own = product.transpose(1, 2) if self._in_order else product[self.prefix_index, :, self._group_index]
        return own.reshape(-1, 1, prefix.shape[2])


class RingBuffer:
    """The last states of the image, or of each column of it; see the module's docstring."""

    def __init__(self, rings: int, slots: int) -> None:
        """rings: state i belongs to ring i % rings; slots: states that a ring keeps."""
        self.rings, self.slots = rings, slots
        self.states = rings * slots  # kept of a sample

    def allocate(self, rows: int, like: Tensor) -> None:
        """Make room. rows: samples times heads; like: a tensor that has D, dtype and device."""
        self._buffer = like.new_zeros(self.rings, 2, rows, self.slots, like.shape[-1])
        self._slot_index = torch.arange(self.slots, device=like.device)

    def append(self, newest: Tensor, index: int | Tensor) -> VisibleKeys:
        """Keep key and value of state `index`, [2, N, H, D], and return all that this state sees, itself included.

        With the index in a tensor, int64 [1], all shapes are the same at every state, as a CUDA graph requires.
        """
        if isinstance(index, int):
            buffer = self._buffer[index % self.rings]
            _put(buffer, index // self.rings % self.slots, newest)
            return buffer.narrow(2, 0, min(index // self.rings + 1, self.slots)), None
        ring = index % self.rings
        self._buffer[ring, :, :, index // self.rings % self.slots] = newest.flatten(1, 2)
        buffer = self._buffer[0] if self.rings == 1 else self._buffer.index_select(0, ring)[0]
        return buffer, self._slot_index > index // self.rings


class SlidingWindow:
    """The window of a conv layer: `reach` rows above, each from `reach` columns before to `reach` after, and the last
    reach + 1 states; see the module's docstring."""

    def __init__(self, grid: int, reach: int) -> None:
        """grid: codes on a side; above 2 reach, else the window has no gaps and a ring buffer does."""
        self.grid, self.reach, self.columns = grid, reach, 2 * reach + 1
        self.above = self.columns * reach  # visible states of the rows above
        self.states = grid * reach + self.above + reach + 1

    def allocate(self, rows: int, like: Tensor) -> None:
        """As `RingBuffer.allocate`."""
        self._waiting = like.new_zeros(self.grid, 2, rows, self.reach, like.shape[-1])
        self._visible = like.new_zeros(2, rows, self.above + self.reach + 1, like.shape[-1])
        self._column_index, self._row_index, self._own_index = (
            torch.arange(count, device=like.device) for count in (self.columns, self.reach, self.reach + 1)
        )

    def append(self, newest: Tensor, index: int | Tensor) -> VisibleKeys:
        """As `RingBuffer.append`."""
        reach, entering = self.reach, index + self.reach  # the state whose column comes into the window
        start = entering % self.columns * reach  # of that column's slots
        if isinstance(index, int):
            self._visible.narrow(2, int(start), reach).copy_(self._waiting[entering % self.grid])
            _put(self._visible, self.above + index % (reach + 1), newest)
            _put(self._waiting[index % self.grid], index // self.grid % reach, newest)
            return self._visible, self._empty(index) if index < reach * (self.grid + 1) else None
        self._visible[:, :, start + self._row_index] = self._waiting.index_select(0, (index + reach) % self.grid)[0]
        self._visible[:, :, self.above + index % (reach + 1)] = newest.flatten(1, 2)[:, :, None]
        self._waiting[index % self.grid, :, :, index // self.grid % reach] = newest.flatten(1, 2)
        return self._visible, self._empty(index)

    def _empty(self, index: int | Tensor) -> Tensor:
        """Mask of the visible slots that are still empty: bool [states]."""
        ahead = index + self.reach
        newest = ahead - (ahead - self._column_index) % self.columns  # that entered each column's slots; < 0: none did
        return torch.cat([(self._row_index >= (newest // self.grid)[:, None]).flatten(), self._own_index > index])


def image_buffer(kind: Kind, layout: Layout) -> RingBuffer | SlidingWindow:
    """The buffer of image states that a layer of this kind needs."""
    grid, reach = layout.grid, layout.conv_kernel // 2
    if kind == "conv" and 0 < 2 * reach < grid:
        return SlidingWindow(grid, reach)
    if kind == "column":
        return RingBuffer(grid, grid)
    slots = {"row": grid + 1, "conv": reach * (grid + 1) + 1}.get(kind, grid**2)
    return RingBuffer(1, min(slots, grid**2))


def _put(buffer: Tensor, slot: int, newest: Tensor) -> None:
    """Copy [2, N, H, D] into one slot of [2, N * H, slots, D]."""
    buffer.select(2, slot).view(newest.shape).copy_(newest)
