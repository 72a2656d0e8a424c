"""VQ-VAE-2: images to a pyramid of codes and back (Razavi et al., arXiv 1906.00446, Sec. 3.1 and App. A).

The defaults are the paper's ImageNet 256 autoencoder: 32x32 codes on top, 64x64 at the bottom; three levels on images
of 1024 pixels are its FFHQ autoencoder. Levels are counted from the top, the coarsest, which is quantized first: what
it stands for is decoded and shown to the next finer level before that is quantized. The priors over the codes are
another stage. Nothing is random but the choice of vectors from which unused codes restart, which comes from the
samples' seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from dalle_scale import types
from dalle_scale.models.codebook_init import start_codebooks
from dalle_scale.models.image_tokenizer import flat
from dalle_scale.models.reconstruction import TokenizerStage, squared_error
from dalle_scale.models.vqvae import Decoder, Encoder, to_bytes, to_levels, to_pixels
from dalle_scale.nn.vector_quantizer import Quantized, Quantizer, QuantizerConfig
from dalle_scale.types import Batch, Losses, Nets, StrictModel


class VQVAE2Config(StrictModel):
    """One VQ-VAE-2."""

    image_size: int = Field(default=256, ge=4)  # pixels
    downsampling: int = Field(default=4, ge=2)  # pixels per code of the bottom level along a side
    levels: int = Field(default=2, ge=2, validate_default=True)  # each above the bottom has half the side
    augment: Literal["none", "dvae", "transformer"] = "none"

    width: int = Field(default=128, ge=1)  # channels of the convolutions
    residual_width: int = Field(default=64, ge=1)  # channels inside a residual block
    blocks: int = Field(default=2, ge=0)  # residual blocks in each encoder and decoder
    dim: int = Field(default=64, ge=1)  # channels of the features that are quantized
    quantizer: QuantizerConfig = QuantizerConfig()  # of each level; the codebooks are its own

    usage_every: int = Field(default=100, ge=1)  # steps between sums of code counts over the ranks
    usage_window_samples: int = Field(default=10_000, ge=1)

    @property
    def grids(self) -> tuple[int, ...]:
        """Codes along a side of each level, top first."""
        return tuple(self.image_size // (self.downsampling << above) for above in reversed(range(self.levels)))

    @field_validator("levels")
    @classmethod
    def _check_levels(cls, value: int, info: ValidationInfo) -> int:
        if {"image_size", "downsampling"} <= set(info.data):
            size, bottom = info.data["image_size"], info.data["downsampling"]
            if bottom & (bottom - 1) or size % (bottom << (value - 1)):
                raise ValueError(
                    f"downsampling {bottom} must be a power of two, and image_size {size} divide by "
                    f"downsampling x 2^(levels - 1) = {bottom << (value - 1)}"
                )
        return value


class VQVAE2(nn.Module):
    """The encoders from the bottom up, the quantizers from the top down, and the decoder of all levels together.

    `maps` below are the vectors of all codes so far, those of the coarser levels brought to the side of the finest by
    transposed convolutions, as channels: [B, (level + 1) dim, side, side].
    """

    def __init__(self, config: VQVAE2Config) -> None:
        super().__init__()
        levels, dim, width = config.levels, config.dim, config.width
        shape = (width, config.residual_width, config.blocks)
        # Lists over levels start at the top; encoders run from the back
        self.encoders = nn.ModuleList(Encoder(width, *shape, 2, mixing=True) for _ in range(levels - 1))
        self.encoders.append(Encoder(3, *shape, config.downsampling, mixing=True))
        self.to_features = nn.ModuleList(nn.Conv2d(width + (dim if level else 0), dim, 1) for level in range(levels))
        self.quantizers = nn.ModuleList(Quantizer(config.quantizer, dim) for _ in range(levels))
        above = range(1, levels)  # entry i serves what lies above level i + 1
        self.contexts = nn.ModuleList(Decoder(level * dim, *shape, 2, n_out=dim) for level in above)
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(level * dim, level * dim, 4, 2, 1) for level in above)
        self.decoder = Decoder(levels * dim, *shape, config.downsampling, n_out=3)

    def forward(
        self, images: Tensor, weight: Tensor | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """uint8 images [B, 3, S, S], weight [B] and seeds [B] for the quantizers' statistics ->
        pixels [B, 3, S, S] in -1 .. 1; codes int64 [B, side, side] of each level, top first; the sum of the quantizers'
        losses, fp32 [B]."""
        hidden = self.hidden(images)
        maps: Tensor | None = None
        levels: list[Quantized] = []
        for level in range(len(self.quantizers)):
            levels.append(self.quantizers[level](self.features(level, hidden, maps), weight, seeds))
            maps = self.stack(level, maps, levels[-1].values)
        loss = torch.stack([quantized.loss for quantized in levels]).sum(dim=0)
        return self.decoder(maps), [quantized.codes for quantized in levels], loss

    def hidden(self, images: Tensor) -> list[Tensor]:
        """Encoder outputs of uint8 images [B, 3, S, S]: [B, width, side, side] for each level, top first."""
        x, hidden = to_pixels(images), []
        for encoder in reversed(self.encoders):
            x = encoder(x)
            hidden.append(x)
        return hidden[::-1]

    def features(self, level: int, hidden: Sequence[Tensor], maps: Tensor | None) -> Tensor:
        """Vectors to quantize at a level, [B, dim, side, side], given the maps of those above (None at the top)."""
        x = hidden[level]
        if maps is not None:
            x = torch.cat([self.contexts[level - 1](maps), x], dim=1)
        features: Tensor = self.to_features[level](x)
        return features

    def stack(self, level: int, maps: Tensor | None, values: Tensor) -> Tensor:
        """The maps with the vectors [B, dim, side, side] of a level added."""
        if maps is None:
            return values
        enlarge = self.enlarge[level - 1]
        larger: Tensor = enlarge(maps.to(next(enlarge.parameters()).dtype))
        return torch.cat([larger, values.to(larger.dtype)], dim=1)

    def encode(self, images: Tensor, levels: int | None = None) -> tuple[list[Tensor], Tensor | None]:
        """uint8 images [B, 3, S, S] -> codes int64 [B, side, side] of the `levels` topmost levels (None = all), and
        their maps."""
        hidden, maps, codes = self.hidden(images), None, []
        for level in range(len(self.quantizers) if levels is None else levels):
            codes.append(self.quantizer(level).encode(self.features(level, hidden, maps)))
            maps = self.stack(level, maps, self.quantizer(level).lookup(codes[-1]))
        return codes, maps

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes int64 [B, side, side] of each level, top first -> pixels [B, 3, S, S] in -1 .. 1."""
        maps: Tensor | None = None
        for level, squares in enumerate(codes):
            maps = self.stack(level, maps, self.quantizer(level).lookup(squares))
        pixels: Tensor = self.decoder(maps)
        return pixels

    def quantizer(self, level: int) -> Quantizer:
        """The quantizer of a level."""
        quantizer = self.quantizers[level]
        assert isinstance(quantizer, Quantizer)
        return quantizer


class Stage(TokenizerStage):
    """Trains one net, "model"."""

    Config = VQVAE2Config

    def __init__(self, config: VQVAE2Config, upstream: types.ImageTokenizer | None = None) -> None:
        super().__init__(config, upstream, config.quantizer.vocab, config.grids)
        self.config: VQVAE2Config = config

    def nets(self) -> Nets:
        return {"model": VQVAE2(self.config)}

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """Squared error of pixels in -1 .. 1, averaged over the pixel values, and the levels' quantizer losses, each
        averaged over positions and channels (Sec. 2.1, Eq. 2).

        Terms: mse (0..255 scale), quantizer_loss (with update "ema" the commitment terms times beta).
        """
        images, weight = batch["image"], batch["weight"]
        pixels, codes, quantizer_loss = nets[net](images, weight, batch["seed"])
        distortion = (pixels.float() - to_pixels(images)).square().mean(dim=(1, 2, 3))
        total = ((distortion + quantizer_loss) * weight).mean()
        with torch.no_grad():
            mse = squared_error(to_levels(pixels), images)
            if nets[net].training and total.requires_grad:
                self._usage.add(flat(codes), mse, weight > 0)
            terms = {"mse": (mse * weight).mean(), "quantizer_loss": (quantizer_loss * weight).mean()}
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def after_step(self, nets: Nets, step: int) -> dict[str, Tensor]:
        """Move the codes; values as in `TokenizerStage`."""
        model = cast(VQVAE2, nets["model"])
        for level in range(self.config.levels):
            model.quantizer(level).after_step(step)
        return super().after_step(nets, step)

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:
        """With `quantizer.init: kmeans`, cluster the features of `init_samples` training images (progress bar), from
        the top down, since each level sees the codes above it."""
        model = cast(VQVAE2, nets["model"])

        def features(level: int, images: Tensor) -> Tensor:
            _, maps = model.encode(images, levels=level)
            return model.features(level, model.hidden(images), maps)

        levels = [(model.quantizer(level), partial(features, level)) for level in range(self.config.levels)]
        start_codebooks(self.config.quantizer, levels, batches, self.pixels_at_once)

    def encode(self, net: VQVAE2, images: Tensor) -> Sequence[Tensor]:
        return net.encode(images)[0]

    def decode(self, net: VQVAE2, levels: Sequence[Tensor]) -> Tensor:
        return to_bytes(net.decode(levels))

    def round_trip(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels, codes, _ = net(images)
        return to_levels(pixels), flat(codes)
