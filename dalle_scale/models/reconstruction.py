"""Pictures that went through an image tokenizer, to codes and back: how close they are to what went in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dalle_scale.nn.codebook_stats import UsageWindow
from dalle_scale.types import Batch

PREVIEW_SAMPLES = 8
# uint8 images [B, 3, S, S] -> what becomes of them, fp32 [B, 3, S, S] in 0..255 and not rounded, and the codes between,
# int64 [B, N] of all levels
RoundTrip: TypeAlias = "Callable[[Tensor], tuple[Tensor, Tensor]]"


def squared_error(levels: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 [B]: levels in 0..255, not rounded, against uint8 images [B, 3, S, S]."""
    return (levels - images.float()).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(
    round_trip: RoundTrip, batches: Iterable[Batch], vocab: int, grids: Sequence[int] = ()
) -> dict[str, float]:
    """Quality over all samples of all ranks (a collective). Batches lie on the model's device.

    Args:
        round_trip: without noise, and without statistics for training.
        batches: samples of weight 0 do not count.
        vocab: K.
        grids: as in `UsageWindow`.

    Returns:
        psnr_db, from the mean squared error over all values before they are rounded to bytes (finite where the bytes
        are exact); codes_used, share of the K codes that occur, and perplexity of the codes, at each level.
    """
    usage = UsageWindow(vocab, samples=1, grids=grids)
    for batch in batches:
        levels, codes = round_trip(batch["image"])
        usage.add(codes, squared_error(levels, batch["image"]), batch["weight"] > 0)
    return {name: float(value) for name, value in usage.close_chunk().items()}


@torch.no_grad()
def preview(round_trip: RoundTrip, batch: Batch) -> dict[str, Tensor]:
    """The first pictures of a batch above their reconstructions: uint8 [N, 3, 2 S, S]."""
    images = batch["image"][:PREVIEW_SAMPLES]
    levels, _ = round_trip(images)
    return {"reconstruction": torch.cat([images, levels.round().to(torch.uint8)], dim=2)}
