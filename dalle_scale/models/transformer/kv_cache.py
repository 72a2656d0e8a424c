"""Attention of one layer to what was drawn before, while samples are drawn code by code.

Keys and values of a prefix are kept once for all samples that share a caption, those of the image as far as the layer
looks back (near_states.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_scale.models.transformer.kv_ring import near_states
from dalle_scale.models.transformer.masks import Kind, Layout
from dalle_scale.nn.half_on_cpu import attend_all


class Cache:
    """First the prefixes, once per distinct caption; then one image state of every sample at a time.

    Memory is allocated once.
    """

    def __init__(self, kind: Kind, layout: Layout, owners: Tensor) -> None:
        """owners: int64 [N], the row of the prefix batch that each sample goes on from; every row has one."""
        self.layout, self.owners = layout, owners
        self.near = near_states(kind, layout)
        counts = torch.bincount(owners)
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        self._number = torch.empty_like(owners)  # of each sample among those of its caption
        self._number[order] = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
        places = torch.arange(int(counts.max()), device=owners.device) % counts[:, None]
        self._members = order[starts[:, None] + places]  # [captions, most samples of one]; short rows repeat theirs
        self._in_order = torch.equal(self._members.flatten(), torch.arange(len(owners), device=owners.device))
        self._one_each = self._in_order and self._members.shape[1] == 1
        self._prefix_keys = self._prefix_values = owners.new_empty(0)  # until `begin`

    def begin(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the prefixes of the distinct captions, [captions, H, prefix, D] each, and so is the result."""
        captions, heads, prefix, width = key.shape
        assert prefix == self.layout.prefix
        self._prefix_keys = key.transpose(-1, -2).contiguous().view(captions * heads, width, prefix)
        self._prefix_values = value.contiguous().view(captions * heads, prefix, width)
        self.near.begin(len(self.owners) * heads, key)
        return attend_all(query, key, value, is_causal=True)

    def step(self, states: Tensor, index: int | Tensor) -> Tensor:
        """Attention of image state `index` of each sample: query, key and value, [N, 3, H, D], the query already
        divided by sqrt(D) -> [N * H, 1, D].

        Few calls, because for one sample they take as long as the arithmetic; plain products, because for a single
        query they beat the fused kernel on CPUs. With the index in a tensor, int64 [1], all shapes are the same at
        every state, as a CUDA graph wants them, and what is not there yet is hidden.
        """
        width, prefix = states.shape[3], self.layout.prefix
        query, newest = states[:, 0].reshape(-1, 1, width), states[:, 1:].transpose(0, 1)
        seen, hidden = self.near.add(newest, index)
        near_keys, near_values = seen.unbind()
        near = torch.bmm(query, near_keys.transpose(1, 2))
        if hidden is not None:
            near = near.masked_fill(hidden, -torch.inf)
        scores = torch.cat([self._times_prefix(query, self._prefix_keys), near], dim=-1)
        shares = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
        far = self._times_prefix(shares[..., :prefix], self._prefix_values)
        return torch.baddbmm(far, shares[..., prefix:], near_values)

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
