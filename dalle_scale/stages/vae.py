"""The variational autoencoder: images to a Gaussian latent and back (arXiv 1312.6114), convolutional.

The objective is the bound of Sec. 2.2 with the closed-form KL and one sample an image, divided by the number of pixel
values. Everything random about a sample comes from its seed and the step number, so the loss of a sample does not
depend on what it is batched with, nor on rank or world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Literal, cast

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from dalle_scale import dist, types
from dalle_scale.config import parse
from dalle_scale.models.capabilities import Evaluator, Sampler, Space
from dalle_scale.models.latent_codec import Latents
from dalle_scale.models.reconstruction import PREVIEW_SAMPLES, squared_error
from dalle_scale.models.vae import Decoder, DiagonalGaussian, Encoder
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.nn.flops import flops
from dalle_scale.nn.likelihoods import Bernoulli, DiscretisedLogistic, Gaussian, Likelihood, phi, phi_inverse, to_bytes
from dalle_scale.nn.schedules import cosine
from dalle_scale.types import Batch, BatchSpec, Losses, Nets, SampleRequest, StrictModel, UserError

_PREVIEW_STEPS = 8  # images of an interpolation: a row of the log's sheet


class VAEConfig(StrictModel):
    """One VAE. Lengths of schedules are in steps."""

    image_size: int = Field(default=32, ge=2)  # pixels
    augment: Literal["none", "dvae", "transformer"] = "none"

    n_hid: int = Field(default=32, ge=4, multiple_of=4)  # blocks are a quarter as wide inside
    multipliers: tuple[PositiveInt, ...] = Field(  # width of each group of blocks, in n_hid; pooling between groups
        default=(1, 2, 4), min_length=1, validate_default=True
    )
    blocks_per_group: int = Field(default=2, ge=1)
    latent: Literal["map", "vector"] = "map"  # latent_channels numbers a position of the last grid, or in all
    latent_channels: int = Field(default=16, ge=1)

    # Bounds in bits per dimension exist for the discrete ones, bernoulli (black and white) and discretised_logistic
    likelihood: Literal["bernoulli", "gaussian", "discretised_logistic"] = "discretised_logistic"
    gaussian_std: float | None = Field(default=None, gt=0)  # where pixels span 0.1 .. 0.9; None = learned, per value
    gaussian_ln_std_floor: float | None = -5.75  # learned: smallest ln std, about one level; None = unbounded

    beta: float = Field(default=1.0, ge=0)  # weight of the KL (arXiv 1804.03599 names it so); 1 = the bound
    beta_warmup_steps: int = Field(default=0, ge=0)  # from 0 to beta, half a cosine
    # Free bits (arXiv 1606.04934): a channel of the latent, summed over its positions, costs no less than this.
    # The maximum is taken for each image, not of the mean over a minibatch as there: a sample's loss is its own
    free_bits_nats: float = Field(default=0.0, ge=0)

    importance_samples: int = Field(default=64, ge=1)  # samples an image in `evaluate`, K of arXiv 1509.00519

    @property
    def downsampling(self) -> int:
        """Pixels per position of the last grid along a side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def kernel(self) -> int:
        """Positions of the last grid along a side that make one position of the latent."""
        return 1 if self.latent == "map" else self.image_size // self.downsampling

    @property
    def latent_side(self) -> int:
        """Positions of the latent along a side."""
        return self.image_size // self.downsampling // self.kernel

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, side, side]."""
        return (self.latent_channels, self.latent_side, self.latent_side)

    @property
    def latent_dimensions(self) -> int:
        """Size of a latent."""
        return math.prod(self.latent_shape)

    @property
    def values(self) -> int:
        """Pixel values of an image."""
        return 3 * self.image_size**2

    @field_validator("multipliers")
    @classmethod
    def _check_multipliers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        size, downsampling = info.data.get("image_size", 0), 2 ** (len(value) - 1)
        if size % downsampling:
            raise ValueError(f"{len(value)} groups pool by {downsampling}, which does not divide image_size {size}")
        return value


class SamplingOptions(StrictModel):
    """Sampling options of images."""

    temperature: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="standard deviation of z; 0 = one image for all seeds"
    )


class NoOptions(StrictModel):
    """Options of the way to the latents: none."""


class VAE(nn.Module):
    """Encoder and decoder; one `forward` for training and for reconstruction."""

    def __init__(self, config: VAEConfig, maps: int) -> None:
        super().__init__()
        widths = tuple(config.n_hid * multiplier for multiplier in config.multipliers)
        shape = (widths, config.blocks_per_group, config.latent_channels, config.kernel)
        self.encoder = Encoder(*shape)
        self.decoder = Decoder(*shape, maps)

    def forward(self, images: Tensor, seeds: Tensor | None = None, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs that the loss needs.

        Args:
            images: uint8 [B, 3, S, S].
            seeds: int64 [B], source of the noise; None decodes the mean of q(z | x).
            step: step number, for the noise.

        Returns:
            Decoder maps [B, maps, S, S]; mean and log-variance of q(z | x), fp32 [B, C, side, side].
        """
        mean, log_variance = self.encoder(phi(images))
        if seeds is None:
            return self.decoder(mean), mean, log_variance
        noise = normal_noise(seeds, step, mean[0].numel())
        return self.decoder(DiagonalGaussian(mean, log_variance).at(noise)), mean, log_variance


class Stage(types.Stage):
    """Trains one net, "model"."""

    Config = VAEConfig

    def __init__(self, config: VAEConfig, upstream: types.ImageTokenizer | None = None) -> None:
        super().__init__(config, upstream)
        self.config: VAEConfig = config
        self.likelihood: Likelihood
        if config.likelihood == "bernoulli":
            self.likelihood = Bernoulli()
        elif config.likelihood == "gaussian":
            self.likelihood = Gaussian(config.gaussian_std, config.gaussian_ln_std_floor)
        else:
            self.likelihood = DiscretisedLogistic()

    @property
    def inputs(self) -> BatchSpec:
        return BatchSpec(image_size=self.config.image_size, augment=self.config.augment)

    def nets(self) -> Nets:
        return {"model": VAE(self.config, self.likelihood.channels)}

    def beta(self, step: int) -> float:
        """Weight of the KL term at a step."""
        return cosine(step, 0.0, self.config.beta, self.config.beta_warmup_steps)

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """(nll + beta * KL with free bits) / pixel values, in nats; nll and KL are sums over an image.

        Terms: nll (nats per value), kl (nats per image, without free bits), mse (of the reconstruction from a sample,
        0..255 scale), beta; for discrete likelihoods bits_per_dim, the negative bound itself: beta 1 and no free bits.
        """
        images, weight = batch["image"], batch["weight"]
        beta = self.beta(step)
        maps, mean, log_variance = nets[net](images, batch["seed"], step)
        nll = self.likelihood.nll(maps, phi(images)).mean(dim=(1, 2, 3))
        channel_kl = DiagonalGaussian(mean, log_variance).kl().sum(dim=(2, 3))
        paid = channel_kl.clamp(min=self.config.free_bits_nats).sum(dim=1)
        total = ((nll + beta / self.config.values * paid) * weight).mean()
        with torch.no_grad():
            per_sample = {"nll": nll, "kl": channel_kl.sum(dim=1), "mse": self._squared_error(maps, images)}
            if self.likelihood.discrete:
                per_sample["bits_per_dim"] = (nll + per_sample["kl"] / self.config.values) / math.log(2)
            terms = {name: (values * weight).mean() for name, values in per_sample.items()}
        return Losses(total, {**terms, "beta": weight.new_full((), beta)})

    @torch.no_grad()
    def evaluate(self, nets: Nets, batches: Iterable[Batch]) -> dict[str, float]:
        """Bounds and quality over all samples of all ranks (a collective). Batches lie on the model's device.

        Args:
            nets: raw modules, not engines.
            batches: noise comes from their seeds, whatever the batch size.

        Returns:
            psnr_db, from the mean squared error over all values of reconstructions from the mean of q(z | x) that are
            not yet rounded to bytes; kl_nats, per image; and for discrete likelihoods, as upper bounds of
            -log2 p(x) per value, elbo_bits_per_dim (mean of K samples) and iwae_bits_per_dim, the tighter bound of the
            same samples (arXiv 1509.00519, Sec. 3), K = importance_samples.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=next(nets["model"].parameters()).device)
        for batch in batches:
            maps, mean, log_variance = nets["model"](batch["image"])
            posterior = DiagonalGaussian(mean, log_variance)
            elbo, iwae = self._bounds(nets, batch, posterior)
            mse = self._squared_error(maps, batch["image"]).double()
            kl = posterior.kl().sum(dim=(1, 2, 3)).double()
            sums += (torch.stack([torch.ones_like(mse), mse, kl, elbo, iwae]) * (batch["weight"] > 0)).sum(dim=1)
        count, *totals = dist.all_reduce(sums).tolist()
        mse, kl, elbo, iwae = (total / count for total in totals)
        result = {"psnr_db": 10 * math.log10(255**2 / mse) if mse else math.inf, "kl_nats": kl}
        if self.likelihood.discrete:
            bits = -1 / (self.config.values * math.log(2))
            result |= {"elbo_bits_per_dim": elbo * bits, "iwae_bits_per_dim": iwae * bits}
        return result

    def _bounds(self, nets: Nets, batch: Batch, posterior: DiagonalGaussian) -> tuple[Tensor, Tensor]:
        """Lower bounds of log p(x) in nats, fp64 [B] each: ELBO and importance-weighted, from the same K samples."""
        samples_per_image = self.config.importance_samples
        shape = (len(posterior.mean), samples_per_image, self.config.latent_dimensions)
        noise = normal_noise(batch["seed"], 0, samples_per_image * self.config.latent_dimensions).view(shape)
        prior = DiagonalGaussian(torch.zeros_like(posterior.mean), torch.zeros_like(posterior.mean))
        target = phi(batch["image"])
        log_p, log_ratio = [], []
        for index in range(samples_per_image):
            z = posterior.at(noise[:, index])
            maps = cast(VAE, nets["model"]).decoder(z)
            log_p.append(-self.likelihood.nll(maps, target).double().sum(dim=(1, 2, 3)))
            log_ratio.append(prior.log_prob(z).double() - posterior.log_prob(z).double())
        likelihoods, ratios = torch.stack(log_p), torch.stack(log_ratio)
        elbo = likelihoods.mean(dim=0) - posterior.kl().double().sum(dim=(1, 2, 3))
        return elbo, torch.logsumexp(likelihoods + ratios, dim=0) - math.log(samples_per_image)

    def evaluator(self, nets: Nets) -> Evaluator:
        """`evaluate` of these nets; the Bernoulli bound is one of black and white images."""
        return Evaluator(partial(self.evaluate, nets), in_bytes=self.config.likelihood != "bernoulli")

    def sampler(self, nets: Nets) -> Sampler:
        """Samples images from the prior."""

        def sample(request: SampleRequest) -> Tensor:
            return self.sample_images(nets, request.seeds, request.options.temperature)

        return Sampler(SamplingOptions, sample)

    def latent_space(self, nets: Nets) -> Space:
        """The means of q(z | x)."""
        return Space(NoOptions, lambda options: self.latents(nets), 0)

    @torch.no_grad()
    def sample_images(self, nets: Nets, seeds: Tensor, temperature: float = 1.0) -> Tensor:
        """Images from the prior, uint8 [B, 3, S, S]: the mean of p(x | z), without pixel noise.

        An image depends on its seed, not on its batch, but for the rounding of convolutions.

        Args:
            nets: raw modules, not engines.
            seeds: int64 [B], one an image.
            temperature: standard deviation of z; 1 = the model's, 0 = the same image for every seed.

        Raises:
            UserError: negative temperature.
        """
        parse(SamplingOptions, {"temperature": temperature}, "options")
        model = cast(VAE, nets["model"])
        seeds = seeds.to(next(model.parameters()).device)
        z = temperature * normal_noise(seeds, 0, self.config.latent_dimensions)
        return self._images(model, z.view(-1, *self.config.latent_shape))

    @torch.no_grad()
    def interpolate(self, nets: Nets, images_a: Tensor, images_b: Tensor, steps: int) -> Tensor:
        """From each image to another, evenly along the line between the means of their latents.

        Args:
            nets: raw modules, not engines.
            images_a: uint8 [B, 3, S, S].
            images_b: uint8 [B, 3, S, S].
            steps: images of a path, both ends (reconstructions) included; 2 or more.

        Returns:
            uint8 [B, steps, 3, S, S].

        Raises:
            UserError: fewer than 2 steps.
        """
        if steps < 2:
            raise UserError(f"steps = {steps}: an interpolation has at least its two ends")
        model = cast(VAE, nets["model"])
        device = next(model.parameters()).device
        start, _ = model.encoder(phi(images_a.to(device)))
        end, _ = model.encoder(phi(images_b.to(device)))
        along = torch.linspace(0, 1, steps, device=device).view(1, steps, 1, 1, 1)
        path = torch.lerp(start[:, None], end[:, None], along)
        decoded = self._images(model, path.flatten(0, 1))
        return decoded.view(-1, steps, *decoded.shape[1:])

    @torch.no_grad()
    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Originals above their reconstructions [N, 3, 2 S, S]; prior samples, always of the same seeds; and a row of
        images from each original to the next one."""
        images = batch["image"][:PREVIEW_SAMPLES]
        maps, _, _ = nets["model"](images)
        path = self.interpolate(nets, images, images.roll(-1, dims=0), _PREVIEW_STEPS)
        return {
            "reconstruction": torch.cat([images, to_bytes(self.likelihood.mean(maps))], dim=2),
            "samples": self.sample_images(nets, torch.arange(PREVIEW_SAMPLES)),
            "interpolation": path.flatten(0, 1),
        }

    def flops_per_sample(self) -> float:
        """Convolutions, forward and backward (counted as twice the forward)."""
        size = self.config.image_size
        return 3 * flops(lambda: self.nets()["model"](torch.empty(1, 3, size, size, dtype=torch.uint8)))

    def latents(self, nets: Nets) -> Latents:
        """The trained net as the encoder below another stage: means of q(z | x) and back to images."""
        model = cast(VAE, nets["model"])
        return Latents(
            model,
            encode=lambda images: model.encoder(phi(images))[0],
            decode=lambda z: self._images(model, z),
            shape=self.config.latent_shape,
            image_size=self.config.image_size,
        )

    def _images(self, model: VAE, z: Tensor) -> Tensor:
        """Latents [N, C, side, side] -> uint8 [N, 3, S, S]."""
        return to_bytes(self.likelihood.mean(model.decoder(z)))

    def _squared_error(self, maps: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of each sample on the 0..255 scale, fp32 [B]."""
        return squared_error(phi_inverse(self.likelihood.mean(maps)), images)
