"""VQ-VAE: images to a square of codes and back (van den Oord et al., arXiv 1711.00937).

The defaults are the paper's CIFAR-10 network (Sec. 4.1) with one code a position (the paper has 8x8x10 latents there)
of 64 channels (the paper does not say). The prior over the codes is another stage. Nothing is random but the choice of
vectors from which unused codes restart, which comes from the samples' seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from dalle_scale import types
from dalle_scale.models.codebook_init import start_codebooks
from dalle_scale.models.reconstruction import TokenizerStage, squared_error
from dalle_scale.models.vqvae import Decoder, Encoder, to_bytes, to_levels, to_pixels
from dalle_scale.nn.field_checks import check_downsampling
from dalle_scale.nn.likelihoods import Gaussian
from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig
from dalle_scale.types import Batch, Losses, Nets, StrictModel


class VQVAEConfig(StrictModel):
    """One VQ-VAE."""

    image_size: int = Field(default=32, ge=2)  # pixels
    downsampling: int = Field(default=4, ge=2, validate_default=True)  # pixels per code along a side
    augment: Literal["none", "dvae", "transformer"] = "none"

    width: int = Field(default=256, ge=1)  # channels of the convolutions
    residual_width: int = Field(default=256, ge=1)  # channels inside a residual block
    blocks: int = Field(default=2, ge=0)  # residual blocks in the encoder, and as many in the decoder
    dim: int = Field(default=64, ge=1)  # channels of the features that are quantized
    quantizer: QuantizerConfig = QuantizerConfig()

    # "mse": squared error of pixels in -1 .. 1; "gaussian": nats under a normal of standard deviation gaussian_std
    # there, which is the same divided by 2 gaussian_std^2 plus a constant, so that beta weighs otherwise
    likelihood: Literal["mse", "gaussian"] = "mse"
    gaussian_std: float = Field(default=0.1, gt=0)

    usage_every: int = Field(default=100, ge=1)  # steps between sums of code counts over the ranks
    usage_window_samples: int = Field(default=10_000, ge=1)

    @property
    def grid(self) -> int:
        """Codes along a side."""
        return self.image_size // self.downsampling

    _check_downsampling = field_validator("downsampling")(check_downsampling)


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder; one `forward` for training and evaluation."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        shape = (config.width, config.residual_width, config.blocks, config.downsampling)
        self.encoder = Encoder(3, *shape, mixing=False)
        self.to_features = nn.Conv2d(config.width, config.dim, 1)
        self.quantizer = Quantizer(config.quantizer, config.dim)
        self.decoder = Decoder(config.dim, *shape, n_out=3)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> what is quantized, [B, dim, h, w]."""
        features: Tensor = self.to_features(self.encoder(to_pixels(images)))
        return features

    def forward(
        self, images: Tensor, weight: Tensor | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 images [B, 3, S, S], weight [B] and seeds [B] for the quantizer's statistics ->
        pixels [B, 3, S, S] in -1 .. 1; codes int64 [B, h, w]; the quantizer's loss, fp32 [B]."""
        quantized = self.quantizer(self.features(images), weight, seeds)
        return self.decoder(quantized.values), quantized.codes, quantized.loss


class Stage(TokenizerStage):
    """Trains one net, "model"."""

    Config = VQVAEConfig

    def __init__(self, config: VQVAEConfig, upstream: types.ImageTokenizer | None = None) -> None:
        super().__init__(config, upstream, config.quantizer.vocab, (config.grid,))
        self.config: VQVAEConfig = config

    def nets(self) -> Nets:
        return {"model": VQVAE(self.config)}

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Equation 3 of the paper, averaged over pixel values and over positions and channels of the features.

        Terms: nll ("gaussian": nats per value), mse (0..255 scale), quantizer_loss (with update "ema" the commitment
        term times beta).
        """
        images, weight = batch["image"], batch["weight"]
        pixels, codes, quantizer_loss = nets[net](images, weight, batch["seed"])
        named = {}
        if self.config.likelihood == "gaussian":
            named["nll"] = Gaussian(self.config.gaussian_std).nll(pixels, to_pixels(images)).mean(dim=(1, 2, 3))
            distortion = named["nll"]
        else:
            distortion = (pixels.float() - to_pixels(images)).square().mean(dim=(1, 2, 3))
        total = ((distortion + quantizer_loss) * weight).mean()
        with torch.no_grad():
            mse = squared_error(to_levels(pixels), images)
            named |= {"mse": mse, "quantizer_loss": quantizer_loss}
            if nets[net].training and total.requires_grad:
                self._usage.add(codes.flatten(1), mse, weight > 0)
            means = (torch.stack([value.detach() for value in named.values()]) * weight).mean(dim=1)
        return Losses(total, dict(zip(named, means, strict=True)))

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """Move the codes; values as in `TokenizerStage`."""
        cast(VQVAE, nets["model"]).quantizer.after_step(step)
        return super().after_step(nets, step)

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:
        """With `quantizer.init: kmeans`, cluster the features of `init_samples` training images (progress bar)."""
        model = cast(VQVAE, nets["model"])
        start_codebooks(self.config.quantizer, [(model.quantizer, model.features)], batches, self.pixels_at_once)

    def encode(self, net: VQVAE, images: Tensor) -> Sequence[Tensor]:
        return [net.quantizer.encode(net.features(images))]

    def decode(self, net: VQVAE, levels: Sequence[Tensor]) -> Tensor:
        return to_bytes(net.decoder(net.quantizer.lookup(levels[0])))

    def round_trip(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels, codes, _ = net(images)
        return to_levels(pixels), codes.flatten(1)
