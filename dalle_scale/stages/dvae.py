"""The discrete VAE of DALL-E: images to a grid of codes and back (arXiv 2102.12092, Sec. 2.1 and App. A).

The defaults are the paper's run at 256x256. Everything random about a sample comes from its seed and the step
number, so the loss of a sample does not depend on what it is batched with, nor on rank or world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale import types
from dalle_scale.models import dvae_kmeans
from dalle_scale.models.codebook_init import first_images
from dalle_scale.models.dvae import Decoder, Encoder
from dalle_scale.models.reconstruction import TokenizerStage, squared_error
from dalle_scale.nn.field_checks import check_downsampling
from dalle_scale.nn.flops import flops
from dalle_scale.nn.gumbel import gumbel_softmax, kl_to_uniform
from dalle_scale.nn.likelihoods import Gaussian, LogitLaplace, phi, phi_inverse, to_bytes
from dalle_scale.nn.schedules import cosine
from dalle_scale.types import Batch, Losses, Nets, StrictModel

_LOGITS_AT_ONCE = 1 << 27  # values of logits that the tokenizer holds at a time (512 MiB in fp32)


class DVAEConfig(StrictModel):
    """One dVAE. Lengths of schedules are in steps."""

    image_size: int = Field(default=256, ge=2)  # pixels
    downsampling: int = Field(default=8, ge=2, validate_default=True)  # pixels per code along a side
    vocab: int = Field(default=8192, ge=2, le=65536)  # K; code shards hold 16 bits a code
    augment: Literal["none", "dvae", "transformer"] = "dvae"  # Listing 1

    # "resnet" (the paper) or "patch": fold downsampling^2 squares into channels first, then stay at that resolution
    stem: Literal["resnet", "patch"] = "resnet"
    n_hid: int = Field(default=256, ge=4, multiple_of=4)  # blocks are a quarter as wide inside
    multipliers: tuple[PositiveInt, ...] = Field(  # width of each group of residual blocks, in n_hid
        default=(1, 2, 4, 8), min_length=1, validate_default=True
    )
    blocks_per_group: int = Field(default=2, ge=1)
    n_init: int = Field(default=128, ge=1)  # width of the decoder's first 1x1 convolution

    likelihood: Literal["logit_laplace", "l2"] = "logit_laplace"
    ln_b_floor: float | None = None  # logit_laplace: smallest ln b; None (the paper) = unbounded
    l2_std: float = Field(default=0.05, gt=0)  # l2: standard deviation of the Gaussian where pixels span 0.1 .. 0.9

    beta_start: float = Field(default=0.0, ge=0)  # weight of the KL term, before the division by pixel values
    beta_end: float = Field(default=6.6, ge=0)
    beta_steps: int = Field(default=5_000, ge=0)
    tau_start: float = Field(default=1.0, gt=0)  # temperature of the relaxation
    tau_end: float = Field(default=1 / 16, gt=0)
    tau_steps: int = Field(default=150_000, ge=0)

    # "kmeans" (patch stem only) starts as a k-means tokenizer over patches of training images. Reconstruction
    # quality then comes from k-means first; training the objective above adds to it.
    init: Literal["random", "kmeans"] = "random"
    init_samples: int = Field(default=2_000, ge=1)  # training images whose patches are clustered
    init_sharpness: float = Field(default=8.0, gt=0)  # nats from a code to its nearest neighbour

    usage_every: int = Field(default=100, ge=1)  # steps between sums of code counts over the ranks
    usage_window_samples: int = Field(default=10_000, ge=1)

    @property
    def grid(self) -> int:
        """Codes along a side."""
        return self.image_size // self.downsampling

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each group."""
        return tuple(self.n_hid * multiplier for multiplier in self.multipliers)

    _check_downsampling = field_validator("downsampling")(check_downsampling)

    @field_validator("multipliers")
    @classmethod
    def _check_multipliers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        poolings = info.data.get("downsampling", 1).bit_length() - 1
        if info.data.get("stem") == "resnet" and len(value) <= poolings:
            raise ValueError(f"stem resnet pools {poolings} times and needs at least {poolings + 1} groups")
        return value

    @field_validator("init")
    @classmethod
    def _check_init(cls, value: str, info: ValidationInfo) -> str:
        if value == "kmeans" and {"stem", "downsampling", "n_hid", "n_init", "multipliers"} <= set(info.data):
            depth = 3 * info.data["downsampling"] ** 2
            width = min(info.data["n_hid"] * min(info.data["multipliers"]), info.data["n_init"])
            if info.data["stem"] != "patch":
                raise ValueError("needs stem: patch")
            if width < depth:
                raise ValueError(f"carries a patch of {depth} values: n_hid and n_init must be at least that")
        return value


class DVAE(nn.Module):
    """Encoder and decoder; one `forward` for training and for hard reconstruction."""

    def __init__(self, config: DVAEConfig, channels: int) -> None:
        super().__init__()
        shape = (config.widths, config.blocks_per_group, config.vocab)
        self.encoder = Encoder(*shape, config.downsampling, config.stem)
        self.decoder = Decoder(*shape, config.n_init, channels, config.downsampling, config.stem)

    def forward(
        self, images: Tensor, tau: float = 0.0, seeds: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs that the loss needs.

        Args:
            images: uint8 [B, 3, S, S].
            tau: temperature of the relaxation; 0 = hard codes without noise.
            seeds: int64 [B], source of the noise; needed when tau > 0.
            step: step number, for the noise.

        Returns:
            Decoder maps [B, channels, S, S]; KL to the uniform prior in nats, fp32 [B, h, w]; codes (argmax of the
            logits, no noise) int64 [B, h, w].
        """
        logits = self.encoder(phi(images))
        codes = logits.detach().argmax(dim=-1)
        kl = kl_to_uniform(logits)  # before the decoder, so that its gradient, as large as the logits, comes after
        if tau == 0:
            return self.decoder(codes), kl, codes
        assert seeds is not None
        return self.decoder(gumbel_softmax(logits, tau, seeds, step)), kl, codes


class Stage(TokenizerStage):
    """Trains one net, "model"."""

    Config = DVAEConfig

    def __init__(self, config: DVAEConfig, upstream: types.ImageTokenizer | None = None) -> None:
        super().__init__(config, upstream, config.vocab, (config.grid,))
        self.config: DVAEConfig = config
        self.likelihood: LogitLaplace | Gaussian = (
            Gaussian(config.l2_std) if config.likelihood == "l2" else LogitLaplace(config.ln_b_floor)
        )

    def nets(self) -> Nets:
        return {"model": DVAE(self.config, self.likelihood.channels)}

    def beta(self, step: int) -> float:
        """Weight of the KL term at a step."""
        return cosine(step, self.config.beta_start, self.config.beta_end, self.config.beta_steps)

    def tau(self, step: int) -> float:
        """Temperature of the relaxation at a step."""
        return cosine(step, self.config.tau_start, self.config.tau_end, self.config.tau_steps)

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """The negative ELB of the paper divided by the number of pixel values.

        Reconstruction is joint over S x S x 3 values and the KL over h x w codes, so the mean KL of a position weighs
        beta h w / (S S 3): beta / 192 at a downsampling of 8.

        Terms: nll (nats per value), kl (nats per code), mse (of the relaxed reconstruction, 0..255 scale), beta, tau.
        """
        images, weight = batch["image"], batch["weight"]
        beta, tau = self.beta(step), self.tau(step)
        maps, kl, codes = nets[net](images, tau, batch["seed"], step)
        nll = self.likelihood.nll(maps, phi(images)).mean(dim=(1, 2, 3))
        kl = kl.mean(dim=(1, 2))
        codes_per_value = self.config.grid**2 / (3 * self.config.image_size**2)
        total = ((nll + beta * codes_per_value * kl) * weight).mean()
        with torch.no_grad():
            mse = self._squared_error(maps, images)
            if nets[net].training and total.requires_grad:
                self._usage.add(codes.flatten(1), mse, weight > 0)
            means = (torch.stack([nll, kl, mse]) * weight).mean(dim=1)
        terms = dict(zip(("nll", "kl", "mse"), means, strict=True))
        return Losses(total, {**terms, "beta": weight.new_full((), beta), "tau": weight.new_full((), tau)})

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:
        """With `init: kmeans`, cluster the patches of `init_samples` training images (progress bar) and start there."""
        if self.config.init != "kmeans":
            return
        images = first_images(batches, self.config.init_samples, "k-means")
        squares = F.pixel_unshuffle(images, self.config.downsampling)
        patches = squares.permute(0, 2, 3, 1).flatten(0, 2)
        centroids, error = dvae_kmeans.codebook(patches, self.config.vocab)
        model = nets["model"]
        assert isinstance(model, DVAE)
        dvae_kmeans.start_from_centroids(
            model.encoder, model.decoder, centroids, error, self.config.init_sharpness, self.likelihood
        )

    def flops_per_sample(self) -> float:
        """Convolutions and matrix products, forward and backward (counted as twice the forward)."""

        def forward() -> None:
            model, size = DVAE(self.config, self.likelihood.channels), self.config.image_size
            model.decoder(model.encoder(torch.empty(1, 3, size, size)))

        return 3 * flops(forward)

    @property
    def samples_at_once(self) -> int:
        return _LOGITS_AT_ONCE // (self.config.grid**2 * self.config.vocab)

    def encode(self, net: DVAE, images: Tensor) -> Sequence[Tensor]:
        return [net.encoder(phi(images)).argmax(dim=-1)]

    def decode(self, net: DVAE, levels: Sequence[Tensor]) -> Tensor:
        return to_bytes(self.likelihood.mean(net.decoder(levels[0])))

    def round_trip(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of hard codes."""
        maps, _, codes = net(images)
        return phi_inverse(self.likelihood.mean(maps)), codes.flatten(1)

    def _squared_error(self, maps: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of each sample on the 0..255 scale, fp32 [B]."""
        return squared_error(phi_inverse(self.likelihood.mean(maps)), images)
