"""VQGAN: an image tokenizer whose images are to look right, not only to be close (Esser et al., arXiv 2012.09841).

Two nets take turns: "model" (encoder, quantizer, decoder) and "discriminator". The model lowers

    L1 + perceptual + commitment + gan_weight x lambda x gan,   lambda = |grad (L1 + perceptual)| / (|grad gan| + 1e-6)

with both gradients those of the decoder's last convolution (eq. 7), lambda at most 1e4. Here the gradients are the
global batch's, their norms are averaged over steps, and a step uses the lambda of those before it: so lambda is
one number for all ranks and micro-batches, and the loss of a sample does not depend on what it is batched with. The
first step in which the discriminator counts only measures.

A convolution's gradient follows from its input and the gradient of its output. So lambda needs no second pass through
the decoder and no parameter: it is the same at every ZeRO stage.

The discriminator trains alone (`discriminator_warmup_steps`) before the model hears of it: an untrained one would
push at random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from dalle_scale import dist, types
from dalle_scale.models.codebook_init import start_codebooks
from dalle_scale.models.reconstruction import TokenizerStage, squared_error
from dalle_scale.models.vqgan import GanDecoder, GanEncoder
from dalle_scale.models.vqvae import to_bytes, to_levels, to_pixels
from dalle_scale.nn.flops import flops
from dalle_scale.nn.lpips import SMALLEST_PIXELS, Lpips, PerceptualConfig, build_lpips, vgg16
from dalle_scale.nn.patchgan import (
    DiscriminatorConfig,
    GanLoss,
    MovingAverage,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam,
)
from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig
from dalle_scale.types import Batch, Losses, Nets, StrictModel

_LARGEST_LAMBDA = 1e4
_LAMBDA_EPS = 1e-6


class VQGANConfig(StrictModel):
    """One VQGAN; the architecture's defaults are the paper's f16 model for ImageNet. Starts are in steps."""

    image_size: int = Field(default=256, ge=2)  # pixels
    augment: Literal["none", "dvae", "transformer"] = "transformer"  # as in types.BatchSpec

    width: int = Field(default=128, ge=1)
    multipliers: tuple[PositiveInt, ...] = Field(  # of each group; halved between groups
        default=(1, 1, 2, 2, 4), min_length=1
    )
    blocks_per_group: int = Field(default=2, ge=1)  # the decoder has one more
    norm_groups: int = Field(default=32, ge=1)
    dim: int = Field(default=256, ge=1)  # channels of the features that are quantized
    quantizer: QuantizerConfig = QuantizerConfig()

    perceptual: PerceptualConfig = PerceptualConfig(kind="random")
    perceptual_weight: float = Field(default=1.0, ge=0)

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    gan_loss: GanLoss = "hinge"
    gan_weight: float = Field(default=0.8, ge=0)
    adaptive_weight: bool = True  # multiply it by lambda
    adaptive_decay: float = Field(default=0.9, ge=0, lt=1)  # of the averages of both gradient norms; 0 = the last ones
    discriminator_start: int = Field(default=0, ge=0)  # step in which it begins to train
    discriminator_warmup_steps: int = Field(default=0, ge=0)  # that it trains before the model hears of it
    lecam_weight: float = Field(default=0.0, ge=0)
    lecam_decay: float = Field(default=0.99, ge=0, lt=1)

    usage_every: int = Field(default=100, ge=1)  # steps between sums of code counts over the ranks
    usage_window_samples: int = Field(default=10_000, ge=1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each group."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def grid(self) -> int:
        """Codes along a side."""
        return self.image_size >> (len(self.multipliers) - 1)

    @property
    def judged_from(self) -> int:
        """First step in which the discriminator's verdict is part of the model's loss."""
        return self.discriminator_start + self.discriminator_warmup_steps

    @model_validator(mode="after")
    def _fits(self) -> VQGANConfig:
        if self.grid << (len(self.multipliers) - 1) != self.image_size:
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(self.multipliers) - 1} times")
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"norm_groups {self.norm_groups} must divide the widths {self.widths}")
        if self.image_size < self.discriminator.smallest_pixels:
            inputs = self.discriminator.smallest_pixels
            raise ValueError(f"discriminator.layers {self.discriminator.layers} need images of {inputs} pixels")
        if self.perceptual.kind != "none" and self.image_size < SMALLEST_PIXELS:
            raise ValueError(f"perceptual.kind {self.perceptual.kind} needs {SMALLEST_PIXELS} pixels a side")
        return self


class VQGAN(nn.Module):
    """The generator: encoder, quantizer, decoder."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        shape = (config.widths, config.blocks_per_group, config.dim, config.norm_groups)
        self.encoder = GanEncoder(*shape)
        self.quantizer = Quantizer(config.quantizer, config.dim)
        self.decoder = GanDecoder(*shape)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> what is quantized, [B, dim, h, h]."""
        features: Tensor = self.encoder(to_pixels(images))
        return features

    def forward(
        self, images: Tensor, weight: Tensor | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs that the loss needs.

        Args:
            images: uint8 [B, 3, S, S].
            weight: [B]; samples of weight 0 do not count in the codebook's statistics.
            seeds: int64 [B], randomness of the codebook's restarts.

        Returns:
            Images around -1 .. 1 [B, 3, S, S]; what the last convolution made them from, without gradient
            [B, C, S, S]; quantizer's loss fp32 [B]; codes int64 [B, h, h].
        """
        quantized = self.quantizer(self.features(images), weight, seeds)
        decoded, last = self.decoder(quantized.values)
        return decoded, last.detach(), quantized.loss, quantized.codes


class Discriminator(PatchDiscriminator):
    """PatchGAN with the averages that the losses need, saved with it: logits of real and of made images, gradient
    norms of likeness (L1 + perceptual) and verdict (gan)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config.discriminator)
        self.logits = MovingAverage(2, config.lecam_decay)
        self.gradient_norms = MovingAverage(2, config.adaptive_decay)


class Stage(TokenizerStage):
    """Trains two nets, "model" and "discriminator"."""

    Config = VQGANConfig
    pixels_at_once = 1 << 22  # 64 images of 256 x 256

    def __init__(self, config: VQGANConfig, upstream: types.ImageTokenizer | None = None) -> None:
        super().__init__(config, upstream, config.quantizer.vocab, (config.grid,))
        self.config: VQGANConfig = config
        self._lpips: Lpips | None = None  # made when first needed: neither exports nor dry runs need its files
        self._gradients: list[Tensor] = []  # of this step's micro-batches: [2, 3, C, 3, 3], likeness and verdict
        self._logits: list[Tensor] = []  # of this step's micro-batches: [2], means over real and made images

    def nets(self) -> Nets:
        return {"model": VQGAN(self.config), "discriminator": Discriminator(self.config)}

    def nets_to_update(self, step: int) -> tuple[str, ...]:
        return ("model",) if step < self.config.discriminator_start else ("model", "discriminator")

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Terms of "model": rec (L1 where pixels span -1 .. 1), perceptual, commitment (x beta, and the codebook loss
        where it has one); from `judged_from` on gan, lambda. Of "discriminator": disc, lecam, and the mean logits of
        real and made images."""
        return self._model_loss(nets, batch, step) if net == "model" else self._discriminator_loss(nets, batch)

    def _model_loss(self, nets: Nets, batch: Batch, step: int) -> Losses:
        images, weight, config = batch["image"], batch["weight"], self.config
        made, last, commitment, codes = nets["model"](images, weight, batch["seed"])
        made, target = made.float(), to_pixels(images)
        judged = step >= config.judged_from
        measuring = judged and config.adaptive_weight and made.requires_grad
        # What is measured needs the gradients at the images, and no pass through an engine but its own backward
        shown = made.detach().requires_grad_() if measuring else made

        terms = {"rec": (shown - target).abs().mean(dim=(1, 2, 3)), "commitment": commitment}
        likeness = terms["rec"]
        if config.perceptual.kind != "none":
            terms["perceptual"] = self._distance(shown, target)
            likeness = likeness + config.perceptual_weight * terms["perceptual"]
        pixels = (likeness * weight).mean()
        if judged:
            terms["gan"] = generator_loss(nets["discriminator"](shown), config.gan_loss)
            verdict, factor = (terms["gan"] * weight).mean(), config.gan_weight * self._lambda(nets)
            if measuring:
                pixels = self._measured(made, shown, last, pixels, verdict, factor)
            else:
                pixels = pixels + factor * verdict
        total = pixels + (commitment * weight).mean()

        means = {name: (term.detach() * weight).mean() for name, term in terms.items()}
        if judged:
            means["lambda"] = self._lambda(nets)
        if nets["model"].training and total.requires_grad:
            mse = squared_error(to_levels(made.detach()), images)
            self._usage.add(codes.flatten(1), mse, weight > 0)
        return Losses(total, means)

    def _measured(
        self, made: Tensor, shown: Tensor, last: Tensor, likeness: Tensor, verdict: Tensor, factor: Tensor
    ) -> Tensor:
        """likeness + factor x verdict with its gradient at `made`, both computed from the leaf `shown`; notes the two
        gradients of the last convolution's weight, which reads `last` [B, C, S, S]."""
        at_pixels = [torch.autograd.grad(loss, shown)[0] for loss in (likeness, verdict)]
        shape = (made.shape[1], last.shape[1], 3, 3)
        weights = [conv2d_weight(last.float(), shape, g, padding=1) for g in at_pixels]  # type: ignore[no-untyped-call]
        self._gradients.append(torch.stack(weights))
        value = likeness.detach() + factor * verdict.detach()
        return value + ((made - made.detach()) * (at_pixels[0] + factor * at_pixels[1])).sum()  # adds 0, and gradients

    def _discriminator_loss(self, nets: Nets, batch: Batch) -> Losses:
        weight, config = batch["weight"], self.config
        with torch.no_grad():
            made = nets["model"](batch["image"])[0].float()
        real, fake = nets["discriminator"](torch.cat([to_pixels(batch["image"]), made])).chunk(2)
        terms = {"disc": discriminator_loss(real, fake, config.gan_loss)}
        total = terms["disc"]
        if config.lecam_weight > 0:
            averages = _average(nets, "logits")
            terms["lecam"] = averages.started() * lecam(real, fake, *averages.value())
            total = total + config.lecam_weight * terms["lecam"]
        terms |= {"real": real.mean(dim=(1, 2)), "fake": fake.mean(dim=(1, 2))}
        means = {name: (term.detach() * weight).mean() for name, term in terms.items()}
        if torch.is_grad_enabled():
            self._logits.append(torch.stack([means["real"], means["fake"]]))
        return Losses((total * weight).mean(), means)

    @torch.no_grad()
    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """Codebook, lambda and LeCam's averages, over all ranks; values as in `TokenizerStage`."""
        cast(VQGAN, nets["model"]).quantizer.after_step(step)
        if self._gradients:
            gradients = dist.all_reduce(torch.stack(self._gradients).mean(dim=0), "mean")
            _average(nets, "gradient_norms").update(gradients.flatten(1).norm(dim=1))
        if self._logits:
            _average(nets, "logits").update(dist.all_reduce(torch.stack(self._logits).mean(dim=0), "mean"))
        self._gradients, self._logits = [], []
        return super().after_step(nets, step)

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:
        """With `quantizer.init: kmeans`, cluster the features that the fresh encoder makes of training images."""
        model = cast(VQGAN, nets["model"])
        start_codebooks(self.config.quantizer, [(model.quantizer, model.features)], batches, self.pixels_at_once)

    def flops_per_sample(self) -> float:
        """Convolutions and matrix products of both turns, once the discriminator counts. In forward passes: 3 for the
        model's training and 1 to show its images to the discriminator; of the discriminator 2 for the model's turn
        and 6 for the two images of its own; of the perceptual features 2, and 1 back."""
        config = self.config
        shape = (1, 3, config.image_size, config.image_size)
        total = 4 * flops(lambda: VQGAN(config)(torch.empty(shape, dtype=torch.uint8)))
        total += 8 * flops(lambda: PatchDiscriminator(config.discriminator)(torch.empty(shape)))
        if config.perceptual.kind != "none":
            total += 3 * flops(lambda: vgg16()(torch.empty(shape)))
        return total

    def encode(self, net: VQGAN, images: Tensor) -> Sequence[Tensor]:
        return [net.quantizer.encode(net.features(images))]

    def decode(self, net: VQGAN, levels: Sequence[Tensor]) -> Tensor:
        return to_bytes(net.decoder(net.quantizer.lookup(levels[0]))[0])

    def round_trip(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        made, _, _, codes = net(images)
        return to_levels(made), codes.flatten(1)

    def _distance(self, made: Tensor, target: Tensor) -> Tensor:
        if self._lpips is None:
            self._lpips = build_lpips(self.config.perceptual, made.device)
        distance: Tensor = self._lpips(made, target)
        return distance

    def _lambda(self, nets: Nets) -> Tensor:
        """The factor of this step, a scalar; 1 without `adaptive_weight`."""
        if not self.config.adaptive_weight:
            return torch.ones((), device=dist.device())
        likeness, verdict = _average(nets, "gradient_norms").value()
        factor: Tensor = (likeness / (verdict + _LAMBDA_EPS)).clamp(max=_LARGEST_LAMBDA)
        return factor


def _average(nets: Nets, name: Literal["logits", "gradient_norms"]) -> MovingAverage:
    """An average of the discriminator, whether it comes bare or in an engine, which looks through to its module."""
    average = getattr(nets["discriminator"], name)
    assert isinstance(average, MovingAverage)
    return average
