"""Memory that a transformer takes to sample: keys and values, logits, fused QKV projections."""

from __future__ import annotations

from typing import cast

from dalle_scale.models.transformer.block import Block
from dalle_scale.models.transformer.kv_cache import image_buffer
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.types import SampleMemory

_LOGIT_COPIES = 12  # of 4 bytes at once: logits, guided, truncated with their sorted codes, noise and its integers
_PREFIX_COPIES = 16  # of a caption's states at once in one layer while its prefix is computed


def sampling_memory(model: Transformer, guided: bool) -> SampleMemory:
    """Bytes of an image and of a caption. Fixed are those of two captions more, which began before a batch or end
    after it, and with guidance of the empty one."""
    column = model.layout.grid * 2 * _state_bytes(model)  # which a column layer copies to read it, on a GPU
    of_caption = caption_bytes(model) + model.layout.prefix * _PREFIX_COPIES * _state_bytes(model)
    return SampleMemory(
        of_image=(cache_bytes(model) + column) * (1 + guided) + _logit_bytes(model),
        of_caption=of_caption,
        fixed=fused_qkv_bytes(model) + (2 + guided) * of_caption,
    )


def cache_bytes(model: Transformer) -> int:
    """Of the keys and values of one image in all layers, without those of its caption."""
    states = {kind: image_buffer(kind, model.layout).states for kind in set(model.kinds)}
    return sum(states[kind] for kind in model.kinds) * 2 * _state_bytes(model)


def caption_bytes(model: Transformer) -> int:
    """Of the keys and values of one caption in all layers."""
    return len(model.kinds) * model.layout.prefix * 2 * _state_bytes(model)


def fused_qkv_bytes(model: Transformer) -> int:
    """Of the fused QKV matrices."""
    return len(model.kinds) * 3 * model.start.shape[1] * _state_bytes(model)


def _state_bytes(model: Transformer) -> int:
    """Of a key, or a value, of all heads."""
    weight = cast(Block, model.blocks[0]).attention.key.weight
    return len(weight) * weight.element_size()


def _logit_bytes(model: Transformer) -> int:
    """Of what is computed over the vocabulary to choose one code."""
    return len(model.image_head.weight) * 4 * _LOGIT_COPIES
