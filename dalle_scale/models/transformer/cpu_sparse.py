"""Attention of row, column and conv layers that computes what they see and little more.

Image states are cut into blocks of queries; the keys that a block sees beside the prefix are gathered, and every block
is dense attention with a small mask, some blocks at a time. The prefix is seen whole by all image states: a second call
without mask. Both calls give the logarithm of the sum of their exponentials, with which their results become those of
one softmax. Backward, the sum of both is put in place of each one's own, as in ring attention (arXiv 2310.01889), so
that nothing but the result is kept.

At the paper's size (258 prefix states, 32 x 32 codes) an image query meets 322 keys in a row layer, 290 in a column
layer and 409 in the conv layer, of which it sees at most 291, 290 and 319; dense attention computes 1282.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dalle_scale.models.transformer.masks import Kind, Layout, conv_offsets, visible
from dalle_scale.nn.half_on_cpu import widened

CONV_BLOCK = 16  # queries; more meet more keys that they do not see, fewer are slow
GROUP_BYTES = 1 << 23  # of keys copied at a time; glibc uses blocks below 32 MiB again, but maps larger ones anew


@dataclass(frozen=True)
class Blocks:
    """Division of the image states of one kind of layer into blocks."""

    size: int  # queries of a block: so many in raster order, or the states of a column
    by_column: bool
    keys: Tensor  # int64 [blocks, keys]: image states; 0 where there is none
    bias: Tensor  # [blocks, 1, queries, keys]: 0 where a query sees the key, else -inf

    def cut(self, image: Tensor) -> Tensor:
        """A view [B, blocks, size, ...] of image states [B, grid^2, ...]."""
        blocked: Tensor = image.unflatten(1, (-1, self.size))
        return blocked.transpose(1, 2) if self.by_column else blocked

    def merge(self, blocked: Tensor) -> Tensor:
        """Back to [B, grid^2, ...]."""
        return (blocked.transpose(1, 2) if self.by_column else blocked).flatten(1, 2)

    def groups(self, image: Tensor) -> Iterator[Group]:
        """All blocks, as many at a time as have GROUP_BYTES of keys [B, grid^2, H, D]."""
        count, met = self.keys.shape
        size = max(1, GROUP_BYTES // (len(image) * met * image[0, 0].numel() * image.element_size()))
        for start in range(0, count, size):
            yield Group(self, slice(start, start + size), len(image))


@dataclass(frozen=True)
class Group:
    """Some of the blocks, N of all samples together."""

    blocks: Blocks
    part: slice
    samples: int

    def queries(self, blocked: Tensor) -> Tensor:
        """Of [B, blocks, size, ...], a copy [N, size, ...]."""
        return blocked[:, self.part].flatten(0, 1)

    def set_queries(self, blocked: Tensor, found: Tensor) -> None:
        """Write [N, size, ...] into [B, blocks, size, ...]."""
        blocked[:, self.part] = found.unflatten(0, (self.samples, -1))

    def add_queries(self, blocked: Tensor, found: Tensor) -> None:
        """Add [N, size, ...] to [B, blocks, size, ...]."""
        blocked[:, self.part] += found.unflatten(0, (self.samples, -1))

    @property
    def bias(self) -> Tensor:
        """For all samples, [N, 1, size, keys]."""
        return self.blocks.bias[self.part].repeat(self.samples, 1, 1, 1)

    def near(self, image: Tensor) -> Tensor:
        """Of keys or values [B, grid^2, H, D], those that each block meets beside the prefix: [N, keys, H, D]."""
        keys = self.blocks.keys[self.part]
        return image.flatten(2).index_select(1, keys.flatten()).view(-1, keys.shape[1], *image.shape[2:])

    def add_near(self, total: Tensor, near: Tensor) -> None:
        """Add to [B, grid^2, H, D] what each block has for those that it meets."""
        keys = self.blocks.keys[self.part].flatten()
        total.flatten(2).index_add_(1, keys, near.reshape(self.samples, len(keys), -1))


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Attention of whole sequences on a CPU: query, key, value [B, H, L, width of a head] -> the same shape.

    Nothing is copied if they are contiguous as [B, L, H, width of a head], as projections leave them, and not of 16
    bits; so is the result.
    """
    states = widened(query, key, value)
    cut = blocks(kind, layout, states[0].dtype, query.device)
    out: Tensor = _Attention.apply(*(state.transpose(1, 2) for state in states), cut, layout.prefix)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).to(query.dtype)


@lru_cache(maxsize=32)
def blocks(kind: Kind, layout: Layout, dtype: torch.dtype, device: torch.device) -> Blocks:
    """The cut of a kind, the same for all layers."""
    with torch.inference_mode(False):
        states = torch.arange(layout.grid**2)
        if kind == "column":
            queries = keys = states.view(layout.grid, layout.grid).T
        else:
            size = layout.grid if kind == "row" else _divisor(layout.grid**2, CONV_BLOCK)
            queries = states.view(-1, size)
            keys = queries[:, :1] + _reach(kind, layout, size)
        seen = visible(kind, layout)[layout.prefix :, layout.prefix :]
        seen = seen[queries[:, :, None], keys.clamp(min=0)[:, None, :]] & (keys >= 0)[:, None, :]
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
        return Blocks(queries.shape[1], kind == "column", keys.clamp(min=0).to(device), bias.to(device))


def _reach(kind: Kind, layout: Layout, size: int) -> Tensor:
    """Offsets from its first state at which a block of `size` states in raster order sees keys: int64 [keys],
    rising."""
    if kind == "row":
        return torch.arange(-layout.grid, size)
    offsets = conv_offsets(layout)
    back = offsets[offsets >= 0]
    reach: Tensor = (torch.arange(size)[:, None] - back).flatten().unique()
    return reach


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


class _Attention(Function):
    """Queries, keys, values and results are [B, L, H, D], or of blocks [B * blocks, states of a block, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, prefix: int) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        of_prefix, image = slice(0, prefix), slice(prefix, None)
        known = key[:, of_prefix], value[:, of_prefix]
        out = torch.empty_like(query)
        out[:, of_prefix], text_sums = _attend(query[:, of_prefix], *known, causal=True)
        far, sums = map(blocks.cut, _attend(query[:, image], *known))
        queries, mixed = blocks.cut(query[:, image]), blocks.cut(out[:, image])
        for group in blocks.groups(key[:, image]):
            keys = group.near(key[:, image]), group.near(value[:, image])
            near, near_sums = _attend(group.queries(queries), *keys, bias=group.bias)
            both = torch.logaddexp(group.queries(sums), near_sums)
            share = (near_sums - both).exp_()[..., None].to(out.dtype)
            group.set_queries(mixed, torch.lerp(group.queries(far), near, share))
            group.set_queries(sums, both)
        ctx.save_for_backward(query, key, value, out, text_sums, blocks.merge(sums))
        ctx.blocks, ctx.prefix = blocks, prefix
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, text_sums, sums = ctx.saved_tensors
        blocks, gradient = ctx.blocks, gradient.contiguous()
        of_prefix, image = slice(0, ctx.prefix), slice(ctx.prefix, None)
        known = key[:, of_prefix], value[:, of_prefix]
        text, whole = ([states[:, part] for states in (gradient, query, out)] for part in (of_prefix, image))
        of_text = _gradients(*text, text_sums, *known, causal=True)
        of_far = _gradients(*whole, sums, *known)
        of_query, *of_keys = (torch.empty_like(query) for _ in range(3))
        of_query[:, of_prefix] = of_text[0]
        of_query[:, image] = of_far[0]
        for of_key, by_text, by_far in zip(of_keys, of_text[1:], of_far[1:], strict=True):
            torch.add(by_text, by_far, out=of_key[:, of_prefix])
            of_key[:, image] = 0
        cut, of_queries = [blocks.cut(states) for states in (*whole, sums)], blocks.cut(of_query[:, image])
        for group in blocks.groups(key[:, image]):
            keys = group.near(key[:, image]), group.near(value[:, image])
            near = _gradients(*map(group.queries, cut), *keys, bias=group.bias)
            group.add_queries(of_queries, near[0])
            for of_key, by_near in zip(of_keys, near[1:], strict=True):
                group.add_near(of_key[:, image], by_near)
        return of_query, *of_keys, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries [N, L, H, D] -> their results, and the logarithms [N, L, H] of their sums of exponentials."""
    states = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, 0.0, causal, attn_mask=bias)
    return out.transpose(1, 2), sums.transpose(1, 2)


def _gradients(*states: Tensor, causal: bool = False, bias: Tensor | None = None) -> list[Tensor]:
    """Gradients of queries, keys and values [N, L, H, D], by gradient, query, out, sums, key and value."""
    gradient, query, out, sums, key, value = (state.transpose(1, 2) for state in states)
    inputs = (gradient, query, key, value, out, sums)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, causal, attn_mask=bias)
    return [grad.transpose(1, 2) for grad in grads]
