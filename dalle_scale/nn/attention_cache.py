"""Keys and values of one layer while samples are drawn code by code, shaped by what the layer sees.

A prefix is kept once for all samples that share a caption. Of the image a row layer keeps the last grid + 1 states and
a conv layer those its window reaches back to, each in a ring; a column layer keeps all, one column of all samples after
the other.
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
        counts = torch.bincount(owners)
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        self._number = torch.empty_like(owners)  # of each sample among those of its caption
        self._number[order] = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
        places = torch.arange(int(counts.max()), device=owners.device) % counts[:, None]
        self._members = order[starts[:, None] + places]  # [captions, most samples of one]; short rows repeat theirs
        self._in_order = torch.equal(self._members.flatten(), torch.arange(len(owners), device=owners.device))
        self._one_each = self._in_order and self._members.shape[1] == 1
        self._sections = layout.grid if kind == "column" else 1  # of the image states
        self._slots = self.image_slots // self._sections  # of each
        self._places = torch.arange(self._slots, device=owners.device)
        self._back = _reach_back(layout).to(owners.device)
        self._prefix_keys = self._prefix_values = self._room = owners.new_empty(0)  # until `begin`

    def begin(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the prefixes of the distinct captions, [captions, H, prefix, D] each, and so is the result."""
        captions, heads, prefix, width = key.shape
        assert prefix == self.layout.prefix
        self._prefix_keys = key.transpose(-1, -2).contiguous().view(captions * heads, width, prefix)
        self._prefix_values = value.contiguous().view(captions * heads, prefix, width)
        # Zeros, because in the static form what is not there yet is multiplied by 0
        self._room = key.new_zeros(self._sections, 2, len(self.owners) * heads, self._slots, width)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def step(self, states: Tensor, index: int | Tensor) -> Tensor:
        """Attention of image state `index` of each sample: query, key and value, [N, 3, H, D], the query already
        divided by sqrt(D) -> [N * H, 1, D].

        Few calls, because for one sample they take as long as the arithmetic; plain products, because for a single
        query they beat the fused kernel on CPUs. With the index in a tensor, int64 [1], all shapes are the same at
        every state, as a CUDA graph wants them, and what is not there yet is hidden.
        """
        width, prefix = states.shape[3], self.layout.prefix
        query, newest = states[:, 0].reshape(-1, 1, width), states[:, 1:].transpose(0, 1)
        section, slot = index % self._sections, index // self._sections % self._slots
        if isinstance(index, int):
            room = self._room[section]
            room.select(2, slot).view(newest.shape).copy_(newest)
            seen, hidden = self._seen(index, room), None
        else:
            self._room[section, :, :, slot] = newest.reshape(2, -1, width)
            room = self._room[0] if self._sections == 1 else self._room.index_select(0, section)[0]
            seen, hidden = self._window(index, room)
        near_keys, near_values = seen.unbind()
        near = torch.bmm(query, near_keys.transpose(1, 2))
        if hidden is not None:
            near = near.masked_fill(hidden, -torch.inf)
        scores = torch.cat([self._times_prefix(query, self._prefix_keys), near], dim=-1)
        shares = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
        far = self._times_prefix(shares[..., :prefix], self._prefix_values)
        return torch.baddbmm(far, shares[..., prefix:], near_values)

    def _seen(self, index: int, section: Tensor) -> Tensor:
        """What an image state sees, itself included: keys and values [2, N * H, states, D]."""
        if self.kind == "conv":
            return section.index_select(2, _window_slots(self.layout, self._slots, section.device)[index])
        return section.narrow(2, 0, min(index // self._sections + 1, self._slots))

    def _window(self, index: Tensor, section: Tensor) -> tuple[Tensor, Tensor]:
        """All slots that an image state could see, and bool [slots], which of them hold nothing yet."""
        if self.kind == "conv":
            return section.index_select(2, (index - self._back) % self._slots), self._back > index
        return section, self._places > index // self._sections

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
    back = _reach_back(layout)
    return [((index - back[back <= index]) % slots).to(device) for index in range(layout.grid**2)]


def _reach_back(layout: Layout) -> Tensor:
    """How far back in raster order the states are that a conv layer sees: int64, from 0 on."""
    offsets = conv_offsets(layout)
    return offsets[offsets >= 0].unique()
