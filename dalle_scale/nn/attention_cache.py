"""Keys and values of one layer while samples are drawn code by code, shaped by what the layer sees.

A prefix is kept once for all samples that share a caption. Of the image a row layer keeps the last grid + 1 states and
a conv layer those its window reaches back to, each in a ring; a column layer keeps all, column by column.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn.attention_mask import Kind, Layout, conv_offsets


class Cache:
    """First the prefixes, once per distinct caption; then one image state of every sample at a time.

    Memory is allocated once.
    """

    def __init__(self, kind: Kind, layout: Layout, owners: Tensor) -> None:
        """owners: int64 [N], the row of the prefix batch that each sample goes on from; every row has one."""
        self.kind, self.layout, self.owners = kind, layout, owners
        reach = {"row": layout.grid + 1, "conv": int(conv_offsets(layout).max()) + 1}.get(kind, layout.grid**2)
        self.image_slots = min(reach, layout.grid**2)
        self.image_states = 0  # seen so far
        counts = torch.bincount(owners)
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        self._number = torch.empty_like(owners)  # of each sample among those of its caption
        self._number[order] = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
        places = torch.arange(int(counts.max()), device=owners.device) % counts[:, None]
        self._members = order[starts[:, None] + places]  # [captions, most samples of one]; short rows repeat theirs
        self._in_order = torch.equal(self._members.flatten(), torch.arange(len(owners), device=owners.device))
        self._one_each = self._in_order and self._members.shape[1] == 1
        self._prefix_keys = self._prefix_values = self._room = owners.new_empty(0)  # until `begin`

    def begin(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the prefixes of the distinct captions, [captions, H, prefix, D] each, and so is the result."""
        captions, heads, prefix, width = key.shape
        assert prefix == self.layout.prefix
        self._prefix_keys = key.transpose(-1, -2).contiguous().view(captions * heads, width, prefix)
        self._prefix_values = value.contiguous().view(captions * heads, prefix, width)
        self._room = key.new_empty(len(self.owners) * heads, self.image_slots, 2 * width)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def step(self, states: Tensor) -> Tensor:
        """Attention of the next image state of each sample: query, key and value, [N, 3, H, D], the query already
        divided by sqrt(D) -> [N * H, 1, D].

        Few calls, because for one sample they take as long as the arithmetic; plain products, because for a single
        query they beat the fused kernel on CPUs.
        """
        samples, _, heads, width = states.shape
        slot = self._room.select(1, self._slot()).view(samples, heads, 2, width)
        slot.copy_(states[:, 1:].transpose(1, 2))
        near_keys, near_values = self._seen().split(width, dim=-1)  # [N * H, states, D]
        self.image_states += 1
        query, prefix = states[:, 0].reshape(-1, 1, width), self.layout.prefix
        near = torch.bmm(query, near_keys.transpose(1, 2))
        scores = torch.cat([self._times_prefix(query, self._prefix_keys), near], dim=-1)
        shares = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
        far = self._times_prefix(shares[..., :prefix], self._prefix_values)
        return torch.baddbmm(far, shares[..., prefix:], near_values)

    def _slot(self) -> int:
        """Of the newest image state."""
        if self.kind == "column":
            row, column = divmod(self.image_states, self.layout.grid)
            return column * self.layout.grid + row
        return self.image_states % self.image_slots

    def _seen(self) -> Tensor:
        """What the newest image state sees, itself included: keys and values [N * H, states, 2 * D]."""
        if self.kind == "column":
            row, column = divmod(self.image_states, self.layout.grid)
            return self._room.narrow(1, column * self.layout.grid, row + 1)
        if self.kind == "conv":
            slots = _window_slots(self.layout, self.image_slots, self._room.device)
            return self._room.index_select(1, slots[self.image_states])
        return self._room.narrow(1, 0, min(self.image_states + 1, self.image_slots))

    def _times_prefix(self, states: Tensor, prefix: Tensor) -> Tensor:
        """Products of [N * H, 1, A] with what is kept of each one's caption, [captions * H, A, B] -> [N * H, 1, B]:
        one product reads a prefix for all its samples."""
        if self._one_each:
            return torch.bmm(states, prefix)
        by_sample = states.view(len(self.owners), -1, states.shape[2])  # [N, H, A]
        grouped = (
            by_sample.view(*self._members.shape, *by_sample.shape[1:]) if self._in_order else by_sample[self._members]
        )
        together = grouped.transpose(1, 2)  # [captions, H, most samples of one, A]
        product = torch.bmm(together.flatten(0, 1), prefix).view(*together.shape[:3], -1)
        own = product.transpose(1, 2) if self._in_order else product[self.owners, :, self._number]
        return own.reshape(-1, 1, prefix.shape[2])


@lru_cache(maxsize=4)
def _window_slots(layout: Layout, slots: int, device: torch.device) -> list[Tensor]:
    """For each image state, in raster order, the slots of those that its conv window sees: int64 [states] each."""
    offsets = conv_offsets(layout)
    back = offsets[offsets >= 0].unique()
    return [((index - back[back <= index]) % slots).to(device) for index in range(layout.grid**2)]
