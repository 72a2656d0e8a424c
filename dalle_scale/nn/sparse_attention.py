"""Attention of row, column and conv layers that computes what they see and little more.

Image states are cut into blocks of queries; the keys that a block sees beside the prefix are gathered, and every block
is dense attention with a small mask. The prefix is seen whole by all image states: a second call without mask. Both
calls give the logarithm of the sum of their exponentials, with which their results become those of one softmax.
Backward, the sum of both is put in place of each one's own, as in ring attention (arXiv 2310.01889), so that nothing
but the result is kept.

At the paper's size (258 prefix states, 32 x 32 codes) an image query meets 322 keys in a row layer, 290 in a column
layer and 409 in the conv layer, of which it sees at most 291, 290 and 319; dense attention computes 1282.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dalle_scale.nn.attention_mask import Kind, Layout, conv_offsets, visible

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CONV_BLOCK = 16  # queries; more meet more keys that they do not see, fewer are slow


@dataclass(frozen=True)
class Blocks:
    """How the image states of one kind of layer are cut."""

    queries: Tensor  # int64 [blocks, queries]: a permutation of the image states
    keys: Tensor  # int64 [blocks, keys]: image states; 0 where there is none
    bias: Tensor  # [1, blocks, queries, keys]: 0 where a query sees the key, else -inf


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Attention of whole sequences on a CPU: query, key, value [B, H, L, width of a head] -> the same shape."""
    prefix = layout.prefix
    text = F.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True
    )
    image = _ImageAttention.apply(query, key, value, blocks(kind, layout, query.dtype, query.device), prefix)
    return torch.cat([text, image], dim=2)


@lru_cache(maxsize=32)
def blocks(kind: Kind, layout: Layout, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The cut of a kind, the same for all layers."""
    with torch.inference_mode(False):
        states = torch.arange(layout.grid**2)
        if kind == "column":
            queries = states.view(layout.grid, layout.grid).T.contiguous()
            keys = queries
        else:
            size = layout.grid if kind == "row" else _divisor(layout.grid**2, CONV_BLOCK)
            queries = states.view(-1, size)
            keys = queries[:, :1] + _reach(kind, layout, size)
        seen = visible(kind, layout)[layout.prefix :, layout.prefix :]
        seen = seen[queries[:, :, None], keys.clamp(min=0)[:, None, :]] & (keys >= 0)[:, None, :]
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[None]
        return Blocks(queries.to(device), keys.clamp(min=0).to(device), bias.to(device))


def _reach(kind: Kind, layout: Layout, size: int) -> Tensor:
    """Where, from its first state, a block of `size` states in raster order sees keys: int64 [keys], rising."""
    if kind == "row":
        return torch.arange(-layout.grid, size)
    offsets = conv_offsets(layout)
    back = offsets[offsets >= 0]
    return (torch.arange(size)[:, None] - back).flatten().unique()


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


class _ImageAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: Blocks, prefix: int) -> Tensor:
        queries = _gather(query, cut.queries, prefix)
        near = _gather(key, cut.keys, prefix), _gather(value, cut.keys, prefix)
        whole = _whole(queries, query)
        out, total = _attend(whole, key[:, :, :prefix], value[:, :, :prefix])
        near_out, near_total = _attend(queries, *near, attn_mask=cut.bias)
        near_total = near_total.reshape(total.shape)
        total_both = torch.logaddexp(total, near_total)
        share = (near_total - total_both).exp_()[..., None].to(out.dtype)
        out = torch.lerp(out, _whole(near_out, query), share)
        ctx.save_for_backward(query, key, value, out, total_both)
        ctx.cut, ctx.prefix = cut, prefix
        return _restored(out, cut)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, total = ctx.saved_tensors
        cut, prefix = ctx.cut, ctx.prefix
        gradient = gradient.index_select(2, cut.queries.flatten())
        queries = _gather(query, cut.queries, prefix)
        near = _gather(key, cut.keys, prefix), _gather(value, cut.keys, prefix)
        far = key[:, :, :prefix], value[:, :, :prefix]
        of_query, *of_far = _attend_backward(gradient, _whole(queries, query), *far, out, total, 0.0, False)
        blocked = (gradient.reshape(queries.shape), queries, *near, out.reshape(queries.shape))
        more, *of_near = _attend_backward(*blocked, total.reshape(queries.shape[:3]), 0.0, False, attn_mask=cut.bias)
        grads = [torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)]
        grads[0].index_copy_(2, cut.queries.flatten() + prefix, of_query + _whole(more, query))
        for grad, of_prefix, of_image in zip(grads[1:], of_far, of_near, strict=True):
            grad[:, :, :prefix] = of_prefix
            grad[:, :, prefix:] = 0
            grad.index_add_(2, cut.keys.flatten() + prefix, _whole(of_image, query))
        return *grads, None, None


def _gather(states: Tensor, index: Tensor, prefix: int) -> Tensor:
    """Image states [B, H, L, D] of each block: [B * H, blocks, states of a block, D]."""
    found = states.index_select(2, index.flatten() + prefix)
    return found.view(-1, *index.shape, states.shape[-1])


def _whole(blocked: Tensor, like: Tensor) -> Tensor:
    """[B * H, blocks, states, D] -> [B, H, blocks * states, D]."""
    return blocked.reshape(*like.shape[:2], -1, like.shape[-1])


def _restored(out: Tensor, cut: Blocks) -> Tensor:
    """From the order of blocks to raster order."""
    return torch.empty_like(out).index_copy_(2, cut.queries.flatten(), out)
