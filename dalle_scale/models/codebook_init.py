"""Codebooks that start at the k-means centroids of what the fresh encoder makes of training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from dalle_scale import log
from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig
from dalle_scale.types import Batch


@torch.no_grad()
def start_codebooks(
    config: QuantizerConfig,
    levels: Sequence[tuple[Quantizer, Callable[[Tensor], Tensor]]],
    batches: Iterable[Batch],
    pixels_at_once: int,
) -> None:
    """With `init: kmeans`, cluster the features of `init_samples` training images (progress bar).

    Args:
        config: of all the quantizers.
        levels: each quantizer with what it quantizes, uint8 images [B, 3, S, S] -> features [B, D, h, w]. One after
            the other: features may depend on the codes of the levels before.
        batches: of training images.
        pixels_at_once: of the images that go through the net together, one at least.

    Raises:
        UserError: fewer features than codes.
    """
    if config.init != "kmeans":
        return
    images = first_images(batches, config.init_samples, "k-means")
    parts = torch.split(images, max(1, pixels_at_once // images[0, 0].numel()))
    for quantizer, features in levels:
        found = torch.cat([features(part).permute(0, 2, 3, 1).flatten(0, 2) for part in parts])
        quantizer.initialize(found, log.progress)


def first_images(batches: Iterable[Batch], count: int, what: str) -> Tensor:
    """The first `count` images of filled slots (or as many as there are), uint8 [N, 3, S, S] on the CPU; shows a
    progress bar that says what they are for."""
    images = (image for batch in batches for image in batch["image"][batch["weight"] > 0].cpu())
    return torch.stack(list(log.progress(islice(images, count), f"{what}: reading", "images", total=count)))
