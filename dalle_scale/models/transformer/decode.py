"""The transformer over one image state of each sample at a time.

For one sample the calls of modules and the look-ups in them take as long as the arithmetic, so a block's weights are
gathered once, and a state goes through as few operations as there can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.models.transformer.block import Block
from dalle_scale.models.transformer.kv_cache import Cache


class DrawingBlock:
    """A block with the keys and values of what was drawn; computes what `Block.forward` does for whole sequences.

    The projections to queries, keys and values are joined in a copy, a quarter of the block's weights.
    """

    def __init__(self, block: Block, cache: Cache) -> None:
        """cache: has begun."""
        attention = block.attention
        self._cache, self._heads, self._dtype = cache, attention.heads, attention.query.weight.dtype
        self._attention_norm, self._mlp_norm = (
            (norm.normalized_shape, norm.weight, norm.bias, norm.eps) for norm in (block.attention_norm, block.mlp_norm)
        )
        query, key, value, self._output, self._expand, self._contract = (
            (of.weight, of.bias.to(self._dtype))
            for of in (attention.query, attention.key, attention.value, attention.output, block.expand, block.contract)
        )
        scale = (len(query[0]) // self._heads) ** -0.5  # of the scores
        weights = torch.cat([(query[0] * scale).t(), key[0].t(), value[0].t()], dim=1).t()
        self._states = weights, torch.cat([query[1] * scale, key[1], value[1]])

    def step(self, x: Tensor, index: int | Tensor) -> Tensor:
        """Image state `index` of each sample, [N, width] -> [N, width]; `Cache.step` says what index may be."""
        normed = F.layer_norm(x, *self._attention_norm).to(self._dtype)
        mixed = self._cache.step(F.linear(normed, *self._states).view(len(x), 3, self._heads, -1), index)
        x = x + F.linear(mixed.view(x.shape), *self._output)
        normed = F.layer_norm(x, *self._mlp_norm).to(self._dtype)
        return x + F.linear(F.gelu(F.linear(normed, *self._expand)), *self._contract)


@dataclass
class Drawing:
    """Images that are being drawn."""

    blocks: list[DrawingBlock]
    graph: Graph | None = None  # of a step, on a GPU


class Graph:
    """A step of drawing as a CUDA graph: one launch for some twenty operations a layer.

    Recorded at the first call and played at every one, on the same memory.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], codes: Tensor, index: int) -> None:
        """step: (codes int64 [N], index int64 [1]) -> logits; calling it twice for an index does no harm. codes, index:
        of the first call."""
        self._codes, self._index = codes.clone(), torch.tensor([index], device=codes.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(self._codes, self._index)  # libraries set themselves up at the first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread, which decodes what was drawn before, may allocate meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = step(self._codes, self._index)

    def __call__(self, codes: Tensor, index: int) -> Tensor:
        """Logits of the code after `index`."""
        self._codes.copy_(codes)
        self._index.fill_(index)
        self._graph.replay()
        return self._logits.clone()
