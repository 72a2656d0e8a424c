"""A stage that makes no codes but evaluates itself on images. Resolved as `stage: support.bounds`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from dalle_scale import dist
from dalle_scale.models.capabilities import Evaluator
from dalle_scale.types import Batch, BatchSpec, Losses, Nets, StrictModel
from dalle_scale.types import Stage as StageBase


class Stage(StageBase):
    """Its numbers are simple means over the images; looks at no more than `batches` batches."""

    class Config(StrictModel):
        size: int = 16
        batches: int = 1_000_000

    config: Config

    @property
    def inputs(self) -> BatchSpec:
        return BatchSpec(image_size=self.config.size)

    def nets(self) -> Nets:
        return {"model": nn.Linear(1, 1)}

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        return Losses(nets[net](torch.zeros(1, 1)).sum())

    def evaluator(self, nets: Nets) -> Evaluator:
        return Evaluator(partial(self.evaluate, nets))

    def evaluate(self, nets: Nets, batches: Iterable[Batch]) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for number, batch in enumerate(batches):
            assert not torch.is_grad_enabled() and (batch["id"] < 0).equal(batch["weight"] == 0)
            sums[0] += (batch["image"].double().mean(dim=(1, 2, 3)) * batch["weight"]).sum()
            sums[1] += batch["weight"].sum()
            if number + 1 == self.config.batches:
                break
        brightness = float(sums[0] / sums[1]) if self.config.batches == 1 else 0.0
        total = dist.all_reduce(sums)
        return {
            "iwae_bits_per_dim": float(total[0] / total[1]),
            "psnr_db": 12.5,
            "kl|nats": float("nan"),
            "first_batch": brightness,
        }
