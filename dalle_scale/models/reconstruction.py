"""Stages that train an image tokenizer: their common part, and how close reconstructions are to the originals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dalle_scale.models.capabilities import Evaluator
from dalle_scale.models.image_tokenizer import Tokenizer
from dalle_scale.nn.codebook_stats import UsageWindow
from dalle_scale.nn.flops import flops
from dalle_scale.types import Batch, BatchSpec, Nets, Stage

PREVIEW_SAMPLES = 8


def squared_error(levels: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of each sample, fp32 [B]: levels in 0..255, not rounded, against uint8 images [B, 3, S, S]."""
    return (levels - images.float()).square().mean(dim=(1, 2, 3))


class TokenizerStage(Stage):
    """Base of a stage that trains an image tokenizer, its net "model"; `vocab` codes, squares of sides `grids`."""

    pixels_at_once = 1 << 20  # of the images that go through the net together outside training

    def __init__(self, config: Any, upstream: Any, vocab: int, grids: Sequence[int]) -> None:
        super().__init__(config, upstream)
        self.vocab, self.grids = vocab, tuple(grids)
        self._usage = self._window(config.usage_window_samples)

    def _window(self, samples: int) -> UsageWindow:
        return UsageWindow(self.vocab, samples, self.grids if len(self.grids) > 1 else ())

    @property
    def inputs(self) -> BatchSpec:
        return BatchSpec(image_size=self.config.image_size, augment=self.config.augment)

    @abstractmethod
    def encode(self, net: Any, images: Tensor) -> Sequence[Tensor]:
        """uint8 images [B, 3, S, S] -> codes of each level, int64 [B, h, w], without noise."""

    @abstractmethod
    def decode(self, net: Any, levels: Sequence[Tensor]) -> Tensor:
        """The reverse: uint8 images."""

    @abstractmethod
    def round_trip(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images [B, 3, S, S] -> reconstructions, fp32 [B, 3, S, S] in 0..255 and not rounded, and the codes
        between, int64 [B, N] of all levels; without noise, and without statistics for training."""

    @property
    def samples_at_once(self) -> int:
        """Images that the tokenizer takes together."""
        return int(self.pixels_at_once // self.config.image_size**2)

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """Every `usage_every` steps, over all ranks and the window: codes_used (share of K), perplexity of each level
        (their names end in _<grid> where there are several), psnr_db of the training reconstructions."""
        return self._usage.close_chunk() if (step + 1) % self.config.usage_every == 0 else {}

    def tokenizer(self, nets: Nets) -> Tokenizer:
        """The trained net, frozen, as an `ImageTokenizer`."""
        net = nets["model"]
        return Tokenizer(
            net,
            partial(self.encode, net),
            partial(self.decode, net),
            vocab=self.vocab,
            grids=self.grids,
            image_size=self.config.image_size,
            samples_at_once=self.samples_at_once,
        )

    @torch.no_grad()
    def evaluate(self, nets: Nets, batches: Iterable[Batch]) -> dict[str, float]:
        """Quality over all samples of all ranks (a collective). Batches lie on the model's device; samples of weight 0
        do not count.

        Returns:
            psnr_db, from the mean squared error over all values before they are rounded to bytes (finite where the
            bytes are exact); codes_used, share of the K codes that occur, and perplexity of the codes, at each level.
        """
        usage = self._window(samples=1)
        for batch in batches:
            levels, codes = self.round_trip(nets["model"], batch["image"])
            usage.add(codes, squared_error(levels, batch["image"]), batch["weight"] > 0)
        return {name: float(value) for name, value in usage.close_chunk().items()}

    def evaluator(self, nets: Nets) -> Evaluator:
        """`evaluate` of these nets."""
        return Evaluator(partial(self.evaluate, nets))

    @torch.no_grad()
    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """The first images of a batch above their reconstructions: uint8 [N, 3, 2 S, S]."""
        images = batch["image"][:PREVIEW_SAMPLES]
        levels, _ = self.round_trip(nets["model"], images)
        return {"reconstruction": torch.cat([images, levels.round().to(torch.uint8)], dim=2)}

    def flops_per_sample(self) -> float:
        """Convolutions and matrix products, forward and backward (counted as twice the forward)."""
        size = self.config.image_size
        return 3 * flops(lambda: self.nets()["model"](torch.empty(1, 3, size, size, dtype=torch.uint8)))
