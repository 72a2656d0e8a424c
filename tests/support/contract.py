"""Every stage by its tiny config, and batches of random content for it."""

from __future__ import annotations

import torch
from support.processes import ROOT

from dalle_scale import config, stages
from dalle_scale.types import Batch, BatchSpec, Nets, Stage

TINY = ROOT / "configs" / "tiny"


NAMES = stages.names()


def build(name: str) -> tuple[Stage, Nets]:
    """The stage of a tiny config with fresh weights."""
    run = config.load(TINY / f"{name}.yaml")
    kind = stages.resolve(name)
    stage = kind(config.parse(kind.Config, run.model, "model"))
    torch.manual_seed(0)
    return stage, stage.nets()


def fake_batch(inputs: BatchSpec, count: int, seed: int = 0) -> Batch:
    """Random content of the right shapes, types and ranges."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    batch = {"id": torch.arange(count), "seed": integers(1 << 40), "weight": torch.ones(count)}
    if inputs.image_size:
        batch["image"] = integers(256, 3, inputs.image_size, inputs.image_size).to(torch.uint8)
    if inputs.text_length:
        batch["text"] = integers(inputs.text_vocab, inputs.text_length)
        batch["text"][:, -1] = inputs.text_vocab + inputs.text_length - 1
    if inputs.num_codes:
        batch["codes"] = integers(inputs.code_vocab, inputs.num_codes)
    return batch
