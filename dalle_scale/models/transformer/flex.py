"""Attention of row, column and conv layers on GPUs by PyTorch's FlexAttention (arXiv 2412.05496): one softmax, in which
blocks of BLOCK x BLOCK pairs of states that nobody sees are skipped.

A column is spread over the whole image in raster order, so column layers take image states column by column: there it
is a window too. At the paper's size (258 prefix states, 32 x 32 codes) 45 of 121 blocks are computed in row layers, 45
in column layers (66 without the turn) and 51 in the conv layer.

FlexAttention is a compiled kernel, and whether one can be made depends on GPU, type and width of a head: `works` tries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dalle_scale import log
from dalle_scale.models.transformer.masks import Kind, Layout

BLOCK = 128  # states; the tiles of FlexAttention's kernels divide it on every GPU. Lengths need not be multiples
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # sample, head, query and key, numbers each -> bool
_tried: dict[Hashable, bool] = {}


def rule(kind: Kind, layout: Layout) -> Rule:
    """`masks.visible` as arithmetic of the numbers of states, which in column layers are those of `turned`."""
    prefix, grid, reach = layout.prefix, layout.grid, layout.conv_kernel // 2

    def row(query: Tensor, key: Tensor) -> Tensor:
        return query - key <= grid

    def column(query: Tensor, key: Tensor) -> Tensor:
        return (query - prefix) // grid == (key - prefix) // grid

    def conv(query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        rows_back = ((offset + grid // 2) // grid).clamp(max=reach)  # of the row of the window that is nearest
        return (offset - rows_back * grid).abs() <= reach

    near = {"row": row, "column": column, "conv": conv}[kind]

    def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((key < prefix) | near(query, key))

    return sees


@lru_cache(maxsize=32)
def block_mask(kind: Kind, layout: Layout, device: torch.device) -> BlockMask:
    """The rule and the blocks in which a query sees a key, the same for all layers of a kind."""
    with torch.inference_mode(False):  # autograd must be able to save it, whoever asks first
        return create_block_mask(rule(kind, layout), None, None, layout.length, layout.length, device, BLOCK)


def turned(states: Tensor, prefix: int, grid: int) -> Tensor:
    """States [B, H, L, D] with the image column by column in place of row by row, or back."""
    image = states[:, :, prefix:].reshape(*states.shape[:2], grid, grid, -1).transpose(2, 3).flatten(2, 3)
    return torch.cat([states[:, :, :prefix], image], dim=2)


def attend_windows(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> Tensor:
    """Attention of whole sequences: query, key, value [B, H, L, width of a head] -> the same shape."""
    mask = block_mask(kind, layout, query.device)
    out: Tensor = _kernel()(query, key, value, mask, kind == "column", layout.prefix, layout.grid)
    return out


def works(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> bool:
    """Whether `attend_windows` can be computed for such tensors, backward pass included, and skips anything.

    Tries it on zeros, once for each shape, which also compiles it. A failure is reported in one line.
    """
    if layout.length <= BLOCK:
        return False
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    like = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in (query, key, value)]
    asked = (kind, layout, *modes, *like)
    if asked not in _tried:
        _tried[asked] = _try(query, key, value, kind, layout)
    return _tried[asked]


def _try(query: Tensor, key: Tensor, value: Tensor, kind: Kind, layout: Layout) -> bool:
    of_query, of_key, of_value = (torch.zeros_like(t, requires_grad=t.requires_grad) for t in (query, key, value))
    try:
        # hooks that do nothing hide what is saved here from activation checkpointing, which counts
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            out = attend_windows(of_query, of_key, of_value, kind, layout)
            if out.requires_grad:
                out.sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:  # dense attention would need more
        raise
    except Exception as error:  # the compiler's, triton's and the driver's are of many classes
        _say_dense(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300])
        return False
    return True


@cache
def _say_dense(why: str) -> None:
    log.say(f"row, column and conv layers are computed densely with a mask, because FlexAttention fails here: {why}")


@cache
def _kernel() -> Callable[..., Any]:
    """`_attend`, compiled for each kind, shape and mode."""
    return torch.compile(_attend, fullgraph=True, dynamic=False)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, by_column: bool, prefix: int, grid: int
) -> Tensor:
    if by_column:
        query, key, value = (turned(states, prefix, grid) for states in (query, key, value))
    out = flex_attention(query, key, value, block_mask=mask)
    assert isinstance(out, Tensor)
    return turned(out, prefix, grid) if by_column else out
