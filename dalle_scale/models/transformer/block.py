"""A residual block of the transformer: for whole sequences, and for one image state of each sample at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.transformer.attention import Attention
from dalle_scale.models.transformer.kv_cache import KVCache
from dalle_scale.models.transformer.masks import Kind, Layout
from dalle_scale.nn.linear import Linear, TransposedLinear
from dalle_scale.nn.residual_scaling import BranchScale


class Block(nn.Module):
    """Attention and MLP, each a branch on a normalised copy of the identity path.

    The matrices may be of 16 bits while gains, biases and the identity path are fp32 (App. D): a branch computes in the
    type of its matrices.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, kind: Kind, layout: Layout) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, kind, layout)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = Linear(width, mlp_ratio * width)
        self.contract = TransposedLinear(mlp_ratio * width, width)
        self.attention_scale, self.mlp_scale = BranchScale(), BranchScale()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """States [B, L, D] -> [B, L, D]: whole sequences, or with a cache to fill the prefixes of the samples."""
        dtype = self.expand.weight.dtype
        normed = self.attention_norm(self.attention_scale.enter(x)).to(dtype)
        x = self.attention_scale.leave(self.attention(normed, cache), x)
        normed = self.mlp_norm(self.mlp_scale.enter(x)).to(dtype)
        return self.mlp_scale.leave(self.contract(F.gelu(self.expand(normed))), x)

    def branches(self) -> list[tuple[BranchScale, list[nn.Parameter]]]:
        """The scale of each branch and the parameters in it."""
        attention = [*self.attention_norm.parameters(), *self.attention.parameters()]
        mlp = [*self.mlp_norm.parameters(), *self.expand.parameters(), *self.contract.parameters()]
        return [(self.attention_scale, attention), (self.mlp_scale, mlp)]


class DecodingBlock:
    """A block with its KV cache, for one image state of each sample at a time.

    Computes what `Block.forward` does for whole sequences; tests/models/test_transformer.py holds the two equal. For
    one sample the calls of modules and the look-ups in them take as long as the arithmetic, so the weights are gathered
    once, and a state goes through as few operations as possible. The fused QKV projection is a copy, a quarter of the
    block's weights.
    """

    def __init__(self, block: Block, cache: KVCache) -> None:
        """cache: filled by `KVCache.prefill`."""
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
        self._fused_qkv = weights, torch.cat([query[1] * scale, key[1], value[1]])

    def decode_step(self, x: Tensor, index: int | Tensor) -> Tensor:
        """Image state `index` of each sample, [N, width] -> [N, width]; for index see `KVCache.decode_step`."""
        normed = F.layer_norm(x, *self._attention_norm).to(self._dtype)
        states = F.linear(normed, *self._fused_qkv).view(len(x), 3, self._heads, -1)
        x = x + F.linear(self._cache.decode_step(states, index).view(x.shape), *self._output)
        normed = F.layer_norm(x, *self._mlp_norm).to(self._dtype)
        return x + F.linear(F.gelu(F.linear(normed, *self._expand)), *self._contract)
