"""A stage small enough to reason about, with every kind of parameter that the engine treats differently.

Resolved as `stage: support.autoencoder` (tests/ is on the path of the tests).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dalle_scale.types import Batch, BatchSpec, Losses, Nets, StrictModel
from dalle_scale.types import Stage as StageBase


class Net(nn.Module):
    """Linear bottleneck on pixels with an embedding per brightness level, a convolution, a norm and two buffers."""

    seen: Tensor
    steps: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Linear(4 * size * size, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.levels = nn.Embedding(4, width)
        self.levels.weight.is_embedding = True  # type: ignore[attr-defined]
        self.up = nn.Linear(width, 3 * size * size)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float [B, 3, S, S] around 0."""
        x = images.to(self.down.weight.dtype) / 127.5 - 1
        level = ((x.mean(dim=(1, 2, 3)) + 1) * 1.999).long()
        hidden = self.norm(self.down(self.conv(x).flatten(1)) + self.levels(level))
        hidden = hidden + torch.tanh(self.mix(hidden))
        return self.up(hidden).view_as(x)


class Stage(StageBase):
    """Mean squared error of the pixels, a little noise of the sample's own seed in the target."""

    class Config(StrictModel):
        size: int = 8
        width: int = Field(default=16, gt=0)
        shift: float = 0.0  # of the weights, by `initialize`
        nan_at: int = -1  # step whose loss is not finite

    config: Config

    @property
    def inputs(self) -> BatchSpec:
        return BatchSpec(image_size=self.config.size)

    def nets(self) -> Nets:
        return {"model": Net(self.config.size, self.config.width)}

    def initialize(self, nets: Nets, batches) -> None:
        if self.config.shift:
            with torch.no_grad():
                nets["model"].up.bias += self.config.shift * next(batches)["image"].float().mean() / 255

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        target = batch["image"].float() / 127.5 - 1
        noise = torch.sin(batch["seed"].double() % 1000)[:, None, None, None].float() * 0.1
        error = (nets[net](batch["image"]).float() - target - noise).pow(2).mean(dim=(1, 2, 3))
        total = (error * batch["weight"]).mean()
        if step == self.config.nan_at:
            total = total * float("nan")
        return Losses(total, {"error": total.detach()})

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        net = nets["model"]
        net.steps += 1
        net.seen += 0.5
        return {"seen": net.seen}

    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        made = ((nets["model"](batch["image"][:4]).float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return {"reconstruction": torch.stack([batch["image"][:4], made], dim=1).flatten(0, 1)}

    def flops_per_sample(self) -> float:
        size, width = self.config.size, self.config.width
        return 6.0 * (4 * 27 * size**2 + 7 * size**2 * width + width**2)

    def tokenizer(self, nets: Nets) -> Tokenizer:
        return Tokenizer(nets)


class Tokenizer:
    """Brightness level of the whole image as its only code."""

    vocab, grids = 4, (1,)

    def __init__(self, nets: Nets) -> None:
        self.net = nets["model"]
        self.image_size = 8

    def encode(self, images: Tensor) -> Tensor:
        return (images.float().mean(dim=(1, 2, 3)) * 4 / 256).long()[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        return (codes * 64)[:, :, None, None].expand(-1, 3, 8, 8).to(torch.uint8)

    def decode_grid(self, *levels: Tensor) -> Tensor:
        squares = (levels[0] * 64).to(torch.uint8)[:, None]
        return squares.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
