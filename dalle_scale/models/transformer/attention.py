"""Causal self-attention over a caption and a grid of image codes, full or sparse (arXiv 2102.12092, App. B.1).

Visible keys of each query: masks.py. Text and image keys share one softmax (footnote 7 of the paper: two were worse).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.transformer import flex
from dalle_scale.models.transformer.cpu_sparse import attend_blocks
from dalle_scale.models.transformer.kv_cache import KVCache
from dalle_scale.models.transformer.masks import Kind, Layout, visible
from dalle_scale.nn.half_on_cpu import attend_all
from dalle_scale.nn.linear import Linear


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
        return attend_all(query, key, value, is_causal=True)
    if query.device.type == "cpu":
        return attend_blocks(query, key, value, kind, layout)
    if query.device.type == "cuda" and flex.works(query, key, value, kind, layout):
        return flex.attend_windows(query, key, value, kind, layout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_bias(kind, layout, query.dtype, query.device))


class Attention(nn.Module):
    """Multi-head attention of one kind; every projection is its own matrix, for optimizers that work by matrix."""

    def __init__(self, width: int, heads: int, kind: Kind, layout: Layout) -> None:
        super().__init__()
        assert width % heads == 0
        self.heads, self.kind, self.layout = heads, kind, layout
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """States [B, L, D] -> [B, L, D]: whole sequences, or with a cache to fill the prefixes of the samples."""
        split = (*x.shape[:2], self.heads, -1)
        query, key, value = (of(x).view(split).transpose(1, 2) for of in (self.query, self.key, self.value))
        mixed = attend(query, key, value, self.kind, self.layout) if cache is None else cache.prefill(query, key, value)
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(x.shape))
        return out
