"""Denoising diffusion (arXiv 2006.11239): a UNet that takes the noise off images, or off latents of a frozen encoder.

Loss: the mean squared error of what the net predicts (L_simple, Eq. 14), of a time sampled evenly from all. With a
learned variance, L_simple + 0.001 L_vlb (arXiv 2102.09672, Sec. 3.1): the bound trains the variance alone.

A batch of other trainers samples times in pairs t, T - 1 - t, half of its images each, which steadies the loss: early
and late times cost very differently. Here a sample's loss depends on nothing but its seed and the step, and two
samples that do not know of each other cannot share a pair. So with `antithetic` each image takes both times of a
pair, with other noise: a step of B images evaluates 2 B maps. (Pairs across steps would steady only averages
over steps, by making each step lopsided.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from dalle_scale import dist, log, types
from dalle_scale.config import parse
from dalle_scale.models.capabilities import Evaluator, Sampler, Space, written_out
from dalle_scale.models.codebook_init import first_images
from dalle_scale.models.diffusion import samplers
from dalle_scale.models.diffusion.latents import ddim_space
from dalle_scale.models.diffusion.process import (
    Diffusion,
    Schedule,
    Target,
    Variance,
    betas_of,
    rate_and_distortion,
    to_bytes,
    to_map,
)
from dalle_scale.models.diffusion.samplers import Method, Options, Predict
from dalle_scale.models.latent_codec import fitting
from dalle_scale.models.unet.layers import norm_groups
from dalle_scale.models.unet.model import UNet
from dalle_scale.nn.counter_rng import normal_noise, uniform_noise
from dalle_scale.nn.field_checks import check_text_vocab
from dalle_scale.nn.flops import flops
from dalle_scale.types import Batch, BatchSpec, ImageTokenizer, Losses, Nets, SampleRequest, StrictModel, UserError

PREVIEW_SAMPLES = 8
SCALE_SAMPLES = 2048  # images whose latents are measured
BOUND_WEIGHT = 0.001  # lambda of L_hybrid; its L_vlb is in bits per value, as in the paper's code
_OF_UNET = {"width", "multipliers", "blocks", "attention_sizes", "dropout", "text_vocab", "text_length"}
_NOISE_STREAMS = 3  # numbers of noise a step: of the map, of time and caption, of dropout


class DDPMConfig(StrictModel):
    """The defaults are the paper's for CIFAR-10."""

    image_size: int = Field(default=32, ge=2)  # pixels
    augment: Literal["none", "dvae", "transformer"] = "none"  # dvae: of images of just this size, flips alone

    latent_channels: int = Field(default=0, ge=0)  # of the latents of `tokenizer:`, a VAE's; 0 = pixels
    latent_size: int = Field(default=0, ge=0, validate_default=True)  # their side
    latent_scale: float | None = Field(default=None, gt=0)  # None = 1 / standard deviation, measured before training

    width: int = Field(default=128, ge=4)  # channels at full size
    multipliers: tuple[int, ...] = Field(default=(1, 2, 2, 2), min_length=1, validate_default=True)  # at each side
    blocks: int = Field(default=2, ge=1)  # residual blocks at each side
    attention_sizes: tuple[int, ...] = Field(default=(16,), validate_default=True)  # sides with attention
    dropout: float = Field(default=0.1, ge=0, lt=1)

    timesteps: int = Field(default=1000, ge=2)  # T
    schedule: Schedule = Field(default="linear", validate_default=True)
    target: Target = "eps"  # what the net predicts; the loss is the plain squared error of just that
    variance: Variance = "fixed_large"
    antithetic: bool = False  # each image at two times, t and T - 1 - t

    text_length: int = Field(default=0, ge=0)  # caption tokens, empty places included; 0 = no captions
    text_vocab: int = Field(default=0, ge=0, validate_default=True)
    bpe_dropout: float = Field(default=0.0, ge=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, lt=1)  # share emptied while training, for guided sampling

    sampler: Method = "ancestral"  # of `sample_images`, by default
    sampling_steps: int | None = Field(default=None, ge=2)  # None = T
    preview_sampling_steps: int = Field(default=25, ge=2)  # of DDIM, for the log
    bound_timesteps: int = Field(default=0, ge=0)  # times above 0 of an image in `evaluate`; 0 = all, exact

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """[C, side, side] of what is diffused."""
        if self.latent_channels:
            return (self.latent_channels, self.latent_size, self.latent_size)
        return (3, self.image_size, self.image_size)

    @field_validator("latent_size")
    @classmethod
    def _check_latent_size(cls, value: int, info: ValidationInfo) -> int:
        if (value > 0) != (info.data.get("latent_channels", value) > 0):
            raise ValueError("set latent_channels and latent_size together, or neither")
        return value

    @field_validator("width")
    @classmethod
    def _check_width(cls, value: int) -> int:
        if value % 4 or value % norm_groups(value):
            raise ValueError("must be a multiple of 4, above 128 of 32: the groups of the norms")
        return value

    @field_validator("multipliers")
    @classmethod
    def _check_multipliers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("must be 1 or more")
        size, halvings = _side(info), len(value) - 1
        if size % 2**halvings:
            raise ValueError(f"{len(value)} sides halve {halvings} times, which {size} cannot")
        return value

    @field_validator("attention_sizes")
    @classmethod
    def _check_attention_sizes(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        sides = [_side(info) >> level for level in range(len(info.data.get("multipliers", ())))]
        if sides and not set(value) <= set(sides):
            raise ValueError(f"the net has the sides {', '.join(map(str, sides))}")
        return value

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, value: Schedule, info: ValidationInfo) -> Schedule:
        if value == "linear" and info.data.get("timesteps", 1000) <= 20:
            raise ValueError("needs more than 20 timesteps, or beta reaches 1; take more, or schedule cosine")
        return value

    _check_text_vocab = field_validator("text_vocab")(check_text_vocab)


def _side(info: ValidationInfo) -> int:
    side: int = info.data.get("latent_size", 0) or info.data.get("image_size", 0)
    return side


class Stage(types.Stage):
    """Trains one net, "model"."""

    Config = DDPMConfig
    takes_latents = True

    def __init__(self, config: DDPMConfig, upstream: ImageTokenizer | None = None) -> None:
        """Raises:
        UserError: an encoder that does not fit, or has codes for latents, or is not asked for.
        """
        super().__init__(config, upstream)
        self.config: DDPMConfig = config
        self.codec = fitting(upstream, config.latent_channels, config.latent_size, config.image_size)
        self.diffusion = Diffusion(betas_of(config.schedule, config.timesteps))

    @property
    def inputs(self) -> BatchSpec:
        """Images, and captions if the model takes them."""
        names = {"image_size", "augment", "text_length", "text_vocab", "bpe_dropout"}
        return BatchSpec(**self.config.model_dump(include=names))

    def nets(self) -> Nets:
        c = self.config
        channels, size, _ = c.map_shape
        n_out = channels * (2 if c.variance == "learned" else 1)
        model = UNet(n_in=channels, n_out=n_out, size=size, **c.model_dump(include=_OF_UNET))
        if c.latent_channels:  # not a number until `initialize` has measured it
            model.register_buffer("latent_scale", torch.tensor(c.latent_scale or math.nan))
        return {"model": model}

    def initialize(self, nets: Nets, batches: Iterator[Batch]) -> None:
        """Measure the latents' scale where the config names none (arXiv 2112.10752, App. G)."""
        if self.codec is not None and self.config.latent_scale is None:
            deviation = self.codec.encode(first_images(batches, SCALE_SAMPLES, "latents")).std()
            cast(Tensor, nets["model"].latent_scale).fill_(1 / deviation)

    def loss(self, net: str, nets: Nets, batch: Batch, step: int) -> Losses:
        """See the module's docstring. Outside of training the noise is that of step 0, so that the losses of two
        validations differ by the weights alone.

        Terms: loss; mse; quarter_1 .. quarter_4, the mse at each quarter of the times, the least noisy first (a sum
        over the rows of a quarter by how many there are on average, so that their mean is the mse); with a learned
        variance bound (bits per value, without L_T).
        """
        training = nets[net].training
        number = _NOISE_STREAMS * step if training else 0
        weight, seeds, x0 = batch["weight"], batch["seed"], self.maps(nets[net], batch["image"])
        random_numbers = uniform_noise(seeds, number + 1, 2)
        times = (random_numbers[:, 0].double() * len(self.diffusion)).long()
        text = self._captions(batch, random_numbers[:, 1] < self.config.caption_dropout if training else None)
        images = None if self.codec else batch["image"]
        if self.config.antithetic:
            times = torch.cat([times, len(self.diffusion) - 1 - times])
            seeds = torch.cat([seeds, ~seeds])  # seeds are not negative: those of the second half are nobody else's
            x0 = torch.cat([x0, x0])
            text, images = (None if rows is None else torch.cat([rows, rows]) for rows in (text, images))
        noise = normal_noise(seeds, number, x0[0].numel()).view_as(x0)
        x = self.diffusion.noisy(x0, times, noise)
        predicted, share = self._split(nets[net](x, times, text, seeds, number + 2))
        target = self.diffusion.target(self.config.target, x0, noise, times)
        mse = (predicted - target).square().flatten(1).mean(dim=1)

        def mean(rows: Tensor) -> Tensor:
            return (rows.view(-1, len(weight)) * weight).mean()

        total, terms = mean(mse), {"mse": mean(mse.detach()), **self._by_quarter(mse.detach(), times, weight)}
        if share is not None:
            x0_predicted = self.diffusion.x0(self.config.target, predicted.detach(), x, times)
            log_variance = self.diffusion.log_variance("learned", times, x, share)
            bits = mean(self.diffusion.bound_bits(images, x0, x0_predicted, log_variance, times))
            bits = bits * len(self.diffusion)
            total, terms["bound"] = total + BOUND_WEIGHT * bits, bits.detach()
        return Losses(total, {"loss": total.detach(), **terms})

    def _by_quarter(self, mse: Tensor, times: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Terms `quarter_n` of the errors [R] at times [R]."""
        steps, terms = len(self.diffusion), {}
        for quarter in range(4):
            first, end = (-(-part * steps // 4) for part in (quarter, quarter + 1))
            inside = (times >= first) & (times < end)
            rows = (mse * inside).view(-1, len(weight)) * weight
            terms[f"quarter_{quarter + 1}"] = rows.mean() * (steps / max(end - first, 1))
        return terms

    def maps(self, net: nn.Module, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> what is diffused, fp32 [B, C, side, side]. The scale of latents lies with the net."""
        if not self.config.latent_channels:
            return to_map(images).contiguous()
        if self.codec is None:
            raise UserError("model.latent_channels: set, but there is no encoder; set tokenizer: <the export of a VAE>")
        return self.codec.encode(images) * cast(Tensor, net.latent_scale)

    def images(self, net: nn.Module, maps: Tensor) -> Tensor:
        """Map diffused states back to images, uint8 [B, 3, S, S]."""
        return self.codec.decode(maps / cast(Tensor, net.latent_scale)) if self.codec else to_bytes(maps)

    def _captions(self, batch: Batch, dropped: Tensor | None = None) -> Tensor | None:
        """int64 [B, T], None in a model without; those `dropped` bool [B] are empty, as all are without "text"."""
        if not self.config.text_length:
            return None
        empty = self.empty_caption(batch["image"].device)
        if "text" not in batch:
            return empty.expand(len(batch["image"]), -1)
        return batch["text"] if dropped is None else torch.where(dropped[:, None], empty, batch["text"])

    def empty_caption(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens [T] of the caption that says nothing: all pads."""
        c = self.config
        return torch.arange(c.text_vocab, c.text_vocab + c.text_length, device=device)

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The net's maps: the prediction, and the share of ln beta in a learned ln variance (0 .. 1 for -1 .. 1)."""
        if self.config.variance != "learned":
            return out, None
        predicted, share = out.chunk(2, dim=1)
        return predicted, (share + 1) / 2

    def predict(
        self, net: nn.Module, x: Tensor, times: Tensor, text: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The map x0 that a noisy one means, not clipped, and the share of `Diffusion.log_variance` if learned."""
        predicted, share = self._split(net(x, times, text))
        return self.diffusion.x0(self.config.target, predicted, x, times), share

    @torch.no_grad()
    def evaluate(self, nets: Nets, batches: Iterable[Batch], bound_timesteps: int | None = None) -> dict[str, float]:
        """The variational bound (Eq. 5) over all samples of all ranks (a collective), x0 clipped as in the paper.

        Args:
            nets: raw modules in eval mode, not engines; the averaged weights, if they are to be compared with others'.
            batches: noise comes from their seeds; without "text" the model sees the empty caption. Batches lie on the
                model's device.
            bound_timesteps: instead of the config's.

        Returns:
            Bits per value, upper bounds of -log2 p(x) in the mean. elbo_bits_per_dim is the sum over all T times of
            rate_bits_per_dim (times above 0, and L_T) and distortion_bits_per_dim (time 0). With `bound_timesteps` k >
            0 the first two end in _estimate: time 0 exactly and k of the times above, without bias.

        Raises:
            UserError: the model is one of latents, or there are no captions and it has never seen an empty one.
        """
        if self.config.latent_channels:
            raise UserError("evaluate: a bound in bits is one of bytes; this model has latents")
        steps = self.config.bound_timesteps if bound_timesteps is None else bound_timesteps
        sums = torch.zeros(3, dtype=torch.float64, device=next(nets["model"].parameters()).device)
        for batch in batches:
            if self.config.text_length and not self.config.caption_dropout and "text" not in batch:
                raise UserError("evaluate: without captions, but this model was trained without caption_dropout")
            predict = partial(self._moments, nets["model"], self._captions(batch))
            watch = partial(log.progress, what="bound", unit="times", total=len(self.diffusion) - 1)
            found = rate_and_distortion(self.diffusion, predict, batch["image"], batch["seed"], steps, watch)
            sums += (torch.stack([torch.ones_like(found[0]), *found]) * (batch["weight"] > 0)).sum(dim=1)
        count, *totals = dist.all_reduce(sums).tolist()
        rate_bits, distortion_bits = (total / count for total in totals)
        suffix = "_estimate" if steps else ""
        return {
            f"elbo_bits_per_dim{suffix}": rate_bits + distortion_bits,
            f"rate_bits_per_dim{suffix}": rate_bits,
            "distortion_bits_per_dim": distortion_bits,
        }

    def evaluator(self, nets: Nets) -> Evaluator:
        """`evaluate` of these nets."""
        return Evaluator(partial(self.evaluate, nets))

    def _moments(self, net: nn.Module, text: Tensor | None, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x0 predicted from x, clipped, and ln of the variance of the step from it."""
        x0, share = self.predict(net, x, times, text)
        return x0.clamp(-1, 1), self.diffusion.log_variance(self.config.variance, times, x, share)

    @torch.no_grad()
    def sample_images(
        self, nets: Nets, seeds: Tensor, *, text: Tensor | None = None, options: Options | None = None
    ) -> Tensor:
        """Sample images, uint8 [N, 3, S, S].

        An image depends on its seed and caption, not on its batch, but for the rounding of convolutions.

        Args:
            nets: raw modules in eval mode, not engines.
            seeds: int64 [N], one an image.
            text: int64 [N, T], where the model takes captions; None = the empty caption.
            options: see models/diffusion/samplers.py; None = the config's.

        Raises:
            UserError: an option that this model does not take.
        """
        options = self._filled(options or Options())
        net = nets["model"]
        seeds = seeds.to(next(net.parameters()).device)

        predict: Predict = partial(self.predict, net)
        if self.config.text_length:
            empty = self.empty_caption(seeds.device)
            text = empty.expand(len(seeds), -1) if text is None else text.to(seeds.device)
            predict = samplers.guided(partial(self.predict, net), text, empty, options.guidance)
        levels, learned = self.diffusion.alphas_cumprod, self.config.variance == "learned"
        maps = samplers.sample(predict, levels, seeds, self.config.map_shape, options, learned)
        return self.images(net, maps)

    def _filled(self, options: Options) -> Options:
        """The model's own values where the options leave them open. Raises UserError."""
        c = self.config
        if options.guidance != 1 and not c.caption_dropout:
            raise UserError(f"guidance: {options.guidance}, but this model was trained without caption_dropout")
        own: dict[str, Any] = {"method": options.method or c.sampler, "steps": options.steps or c.sampling_steps}
        if own["method"] == "ancestral" and options.variance is None:
            own["variance"] = c.variance
        if c.latent_channels and options.clip is None:
            own["clip"] = False  # latents have no range
        return parse(Options, options.model_dump() | own, "options")

    def sampler(self, nets: Nets) -> Sampler:
        """Samples images, by the config's method and steps unless the options name others."""
        c, levels = self.config, self.diffusion.alphas_cumprod

        def sample(request: SampleRequest) -> Tensor:
            text = request.text if c.text_length else None
            return self.sample_images(nets, request.seeds, text=text, options=request.options)

        def resolve(options: Options, primed: bool) -> dict[str, Any]:
            full, learned = self._filled(options), c.variance == "learned"
            samplers.plan(levels, full, learned)
            return written_out(full.resolved(len(levels), learned), primed)

        return Sampler(Options, sample, c.text_length, c.text_vocab, resolve=resolve)

    def latent_space(self, nets: Nets) -> Space:
        """The latents of DDIM; a model with captions sees the empty one."""
        net, c = nets["model"], self.config

        def predict(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor | None]:
            text = self.empty_caption(x.device).expand(len(x), -1) if c.text_length else None
            return self.predict(net, x, times, text)

        ends = partial(self.maps, net), partial(self.images, net)
        return ddim_space(net, predict, self.diffusion.alphas_cumprod, ends, c.map_shape, c.image_size)

    @torch.no_grad()
    def preview(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """Images sampled with few steps, for the batch's first captions, always from the same seeds."""
        count = min(PREVIEW_SAMPLES, len(batch["weight"]))
        options = Options(method="ddim", steps=min(self.config.preview_sampling_steps, len(self.diffusion)), clip=True)
        text = batch["text"][:count] if self.config.text_length else None
        return {"samples": self.sample_images(nets, torch.arange(count), text=text, options=options)}

    def flops_per_sample(self) -> float:
        """Convolutions and matrix products, forward and backward (counted as twice the forward); both times of a pair.
        The frozen encoder is left out."""
        c = self.config

        def forward() -> None:
            text = torch.zeros(1, c.text_length, dtype=torch.int64) if c.text_length else None
            self.nets()["model"](torch.empty(1, *c.map_shape), torch.zeros(1, dtype=torch.int64), text)

        return (2 if c.antithetic else 1) * 3 * flops(forward)
