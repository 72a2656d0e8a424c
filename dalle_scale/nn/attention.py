"""Causal self-attention over a caption and a grid of image codes, full or sparse (arXiv 2102.12092, App. B.1).

Who sees whom is in attention_mask.py. Text and image keys share one softmax (footnote 7 of the paper: two were worse).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.nn.attention_mask import Kind, Layout, visible
from dalle_scale.nn.sparse_attention import attend_blocks


@lru_cache(maxsize=32)
def _bias(kind: Kind, layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask as a term of the scores: 0 where visible, -inf elsewhere; one tensor for all layers of a kind.

    A bool mask would be turned into this one at every call. Not a buffer: nothing to save, broadcast or cast.
    """
    with torch.inference_mode(False):  # autograd must be able to save it, whoever asks first
        hidden = ~visible(kind, layout).to(device)
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Attention of whole sequences: query, key, value [B, H, L, width of a head] -> the same shape."""
    if kind == "full":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if query.device.type == "cpu":
        return attend_blocks(query, key, value, kind, layout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_bias(kind, layout, query.dtype, query.device))


class Cache:
    """Keys and values of one layer while N samples are drawn code by code, in memory allocated once.

    First the prefixes, once per distinct caption; then one image state of every sample at a time. A row layer never
    looks back further than grid + 1 states, so its image part is a ring of that many slots.
    """

    def __init__(self, kind: Kind, layout: Layout, owners: Tensor) -> None:
        """owners: int64 [N], the row of the prefix batch that each sample goes on from."""
        self.kind, self.layout, self.owners = kind, layout, owners
        self.image_slots = min(layout.grid + 1, layout.grid**2) if kind == "row" else layout.grid**2
        self.image_states = 0  # seen so far
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the states that come next; [B, H, states, width of a head] each, and so is the result.

        The first call brings the prefixes (B distinct captions), each later one an image state (B = N samples).
        """
        if self._key is None or self._value is None:
            self._key, self._value = self._allocate(key), self._allocate(value)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        index = self.image_states
        slot = self.layout.prefix + index % self.image_slots
        self._key[:, :, slot] = key[:, :, 0]
        self._value[:, :, slot] = value[:, :, 0]
        self.image_states += 1
        filled = self.layout.prefix + min(self.image_states, self.image_slots)
        # two plain products: for a single query they beat the fused kernel on CPU
        scores = (query * query.shape[-1] ** -0.5) @ self._key[:, :, :filled].transpose(-1, -2)
        if self.kind in ("column", "conv"):
            scores = (
                scores + _bias(self.kind, self.layout, scores.dtype, scores.device)[self.layout.prefix + index, :filled]
            )
        shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed: Tensor = shares @ self._value[:, :, :filled]
        return mixed

    def _allocate(self, prefix: Tensor) -> Tensor:
        """Room for every slot of every sample, with the prefix of its caption filled in."""
        _, heads, states, width = prefix.shape
        assert states == self.layout.prefix
        room = prefix.new_empty(len(self.owners), heads, states + self.image_slots, width)
        room[:, :, :states] = prefix[self.owners]
        return room


class Linear(nn.Linear):
    """A linear layer whose matrix may be of 16 bits while its bias is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], all in the type of the matrix."""
        return F.linear(x, self.weight, self.bias.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention of one kind; every projection is its own matrix, for optimisers that work by matrix."""

    def __init__(self, width: int, heads: int, kind: Kind, layout: Layout) -> None:
        super().__init__()
        assert width % heads == 0
        self.heads, self.kind, self.layout = heads, kind, layout
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """States [B, L, D] -> [B, L, D]: whole sequences, or with a cache the states that come next."""
        batch, states, width = x.shape
        split = (batch, states, self.heads, width // self.heads)
        query = self.query(x).view(split).transpose(1, 2)
        key = self.key(x).view(split).transpose(1, 2)
        value = self.value(x).view(split).transpose(1, 2)
        mixed = attend(query, key, value, self.kind, self.layout) if cache is None else cache.attend(query, key, value)
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, states, width))
        return out
