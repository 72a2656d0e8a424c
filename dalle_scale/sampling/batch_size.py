"""Number of images to sample at a time, by the memory that is free."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from dalle_scale.types import SampleMemory

SAFE_SHARE = 0.8  # of the free memory; the rest is for decoding, CLIP and what the allocator cannot use
MOST_SAMPLES = {"cuda": 512, "cpu": 256}  # from there on the products take the time, not the reading of the weights
UNKNOWN_FREE_BYTES = 2 << 30  # where the system does not tell
_MEMORY_TABLE = Path("/proc/meminfo")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # control groups: containers, jobs of Slurm


def images_per_batch(memory: SampleMemory, captions: int, samples: int, device: torch.device) -> int:
    """Number of `samples` images of so many captions to sample at a time, at least one.

    A batch of N holds up to N * captions / samples captions besides the fixed ones.
    """
    room = SAFE_SHARE * free_bytes(device) - memory.fixed
    fitting = room / (memory.of_image + memory.of_caption * captions / max(1, samples))
    return max(1, min(int(fitting), MOST_SAMPLES[device.type]))


def even(samples: int, most: int) -> int:
    """Size of the fewest batches of at most `most` that are as good as equal: a small last one costs as many steps."""
    return math.ceil(samples / math.ceil(samples / most)) if samples else 1


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
