"""How many pictures a transformer draws at a time: what one of them takes, and what is free."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import cast

import torch

from dalle_scale.models.transformer.block import Block
from dalle_scale.models.transformer.kv_cache import image_buffer
from dalle_scale.models.transformer.model import Transformer

SAFE_SHARE = 0.8  # of the free memory; the rest is for decoding, CLIP and what the allocator cannot use
MOST_SAMPLES = {"cuda": 512, "cpu": 256}  # from there on the products take the time, not the reading of the weights
UNKNOWN_FREE_BYTES = 2 << 30  # where the system does not tell
_LOGIT_COPIES = 12  # of 4 bytes at once: logits, guided, truncated with their sorted codes, noise and its integers
_PREFIX_COPIES = 16  # of a caption's states at once in one layer while its prefix is computed
_MEMORY_TABLE = Path("/proc/meminfo")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # control groups: containers, jobs of Slurm


def batch_samples(model: Transformer, guided: bool, captions: int, samples: int, device: torch.device) -> int:
    """How many of `samples` pictures of so many captions to draw at a time, at least one.

    A batch of N holds up to N * captions / samples captions, two that began before or end after it, and with guidance
    the empty one.
    """
    column = model.layout.grid * 2 * _state_bytes(model)  # which a column layer copies to read it, on a GPU
    of_sample = (cache_bytes(model) + column) * (1 + guided) + _logit_bytes(model)
    of_caption = caption_bytes(model) + model.layout.prefix * _PREFIX_COPIES * _state_bytes(model)
    room = SAFE_SHARE * free_bytes(device) - fused_qkv_bytes(model) - (2 + guided) * of_caption
    fitting = room / (of_sample + of_caption * captions / max(1, samples))
    return max(1, min(int(fitting), MOST_SAMPLES[device.type]))


def even(samples: int, most: int) -> int:
    """Size of the fewest batches of at most `most` that are as good as equal: a small last one costs as many steps."""
    return math.ceil(samples / math.ceil(samples / most)) if samples else 1


def cache_bytes(model: Transformer) -> int:
    """Of the keys and values of one picture in all layers, without those of its caption."""
    states = {kind: image_buffer(kind, model.layout).states for kind in set(model.kinds)}
    return sum(states[kind] for kind in model.kinds) * 2 * _state_bytes(model)


def caption_bytes(model: Transformer) -> int:
    """Of the keys and values of one caption in all layers."""
    return len(model.kinds) * model.layout.prefix * 2 * _state_bytes(model)


def fused_qkv_bytes(model: Transformer) -> int:
    """Of the fused QKV projections, copies that `DecodingBlock` makes."""
    return len(model.kinds) * 3 * model.start.shape[1] * _state_bytes(model)


def free_bytes(device: torch.device) -> int:
    """That this process may take: on a GPU all that is free; of the host's memory its share among the ranks there."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun's, deepspeed's
    return max(0, min([_available_bytes(), *_allowed_bytes()])) // ranks


def _available_bytes() -> int:
    """Of the host's memory, without swapping."""
    if _MEMORY_TABLE.is_file():
        for line in _MEMORY_TABLE.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return UNKNOWN_FREE_BYTES


def _allowed_bytes() -> list[int]:
    """That each control group of this process, and each above it, still allows; none has to have a limit.

    Files that nobody has read lately count as used there and give way.
    """
    found = []
    for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines() if _OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):  # of the first version
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            limit, used = (folder / name for name in names[:2])
            if limit.is_file() and limit.read_bytes().strip() != b"max":
                table = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
                found.append(int(limit.read_bytes()) - int(used.read_bytes()) + int(table.get(names[2], 0)))
    return found


def _state_bytes(model: Transformer) -> int:
    """Of a key, or a value, of all heads."""
    weight = cast(Block, model.blocks[0]).attention.key.weight
    return len(weight) * weight.element_size()


def _logit_bytes(model: Transformer) -> int:
    """Of what is computed over the vocabulary to choose one code."""
    return len(model.image_head.weight) * 4 * _LOGIT_COPIES
