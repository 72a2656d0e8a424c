"""Keys and values of one layer while samples are drawn code by code, shaped by what the layer sees.

A prefix is kept once for all samples that share a caption. Of the image a row layer keeps the last grid + 1 states and
a conv layer those its window reaches back to, each in a ring; a column layer reads one column of all.
"""

from __future__ import annotations

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
        offsets = conv_offsets(layout)
        self._back = offsets[offsets >= 0].unique().to(owners.device)  # that a conv layer sees
        reach = {"row": layout.grid + 1, "conv": int(self._back.max()) + 1}.get(kind, layout.grid**2)
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
        self._prefixes: tuple[Tensor, Tensor] | None = None
        self._rooms: tuple[Tensor, Tensor] | None = None  # [N, H, image_slots, width of a head] each

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the states that come next; [B, H, states, width of a head] each, and so is the result.

        The first call brings the prefixes (B distinct captions), each later one an image state (B = N samples).
        """
        if self._prefixes is None or self._rooms is None:
            assert key.shape[2] == self.layout.prefix
            self._prefixes = key, value
            size = (len(self.owners), key.shape[1], self.image_slots, key.shape[3])
            self._rooms = key.new_empty(size), key.new_empty(size)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        slot = self.image_states % self.image_slots
        for room, state in zip(self._rooms, (key, value), strict=True):
            room[:, :, slot] = state[:, :, 0]
        near = [self._seen(room) for room in self._rooms]
        self.image_states += 1
        # Plain products: for a single query they beat the fused kernel on CPUs
        query = query * query.shape[-1] ** -0.5
        far_scores = self._per_caption(query) @ self._prefixes[0].transpose(-1, -2)
        scores = torch.cat([self._per_sample(far_scores), query @ near[0].transpose(-1, -2)], dim=-1)
        shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        far, close = shares.split([self.layout.prefix, near[0].shape[2]], dim=-1)
        mixed: Tensor = self._per_sample(self._per_caption(far) @ self._prefixes[1]) + close @ near[1]
        return mixed

    def _seen(self, room: Tensor) -> Tensor:
        """The image states that the newest one sees, itself included: [N, H, states, width of a head]."""
        index, grid = self.image_states, self.layout.grid
        if self.kind == "column":
            return room[:, :, index % grid : index + 1 : grid]
        if self.kind == "conv":
            return room.index_select(2, (index - self._back[self._back <= index]) % self.image_slots)
        return room[:, :, : min(index + 1, self.image_slots)]

    def _per_caption(self, states: Tensor) -> Tensor:
        """[N, H, 1, D] -> [captions, H, most samples of one, D]: one product reads a prefix for all its samples."""
        if self._in_order:
            return states.view(*self._members.shape, *states.shape[1::2]).transpose(1, 2)
        return states[self._members, :, 0].transpose(1, 2)

    def _per_sample(self, grouped: Tensor) -> Tensor:
        """The reverse."""
        if self._in_order:
            return grouped.transpose(1, 2).reshape(len(self.owners), grouped.shape[1], 1, -1)
        return grouped[self.owners, :, self._number][:, :, None]
