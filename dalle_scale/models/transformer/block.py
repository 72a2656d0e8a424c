"""A residual block of the transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.transformer.attention import Attention
from dalle_scale.models.transformer.kv_cache import Cache
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

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """States [B, L, D] -> [B, L, D]; with a cache the prefixes that samples begin with."""
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
