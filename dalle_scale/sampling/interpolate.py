"""Pictures between pictures, in the latents of an exported VAE or in those of DDIM (arXiv 2010.02502, Sec. 5.3, 5.4).

Latents of both are standard normal where pictures are drawn from nothing. A path between two follows the arc, which
keeps the length of noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dalle_scale.checkpoint.export import Export
from dalle_scale.models.diffusion import samplers
from dalle_scale.models.latent_codec import Latents
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.stages import ddpm, vae
from dalle_scale.types import UserError


@dataclass(frozen=True)
class Space:
    """Pictures to latents and back."""

    codec: Latents
    noise: int  # number of the noise that stands for a seed, the same as in the stage's `sample_images`


@dataclass(frozen=True)
class Paths:
    """Pictures along B paths of N, ends included."""

    images: Tensor  # uint8 [B, N, 3, S, S]
    originals: Tensor | None  # uint8 [B, 2, 3, S, S], the pictures at the ends where there were any

    @property
    def round_trip_mse(self) -> float | None:
        """Mean squared error of the ends, values 0 .. 1, as in Table 2 of the paper."""
        if self.originals is None:
            return None
        ends = torch.stack([self.images[:, 0], self.images[:, -1]], dim=1)
        return float((ends.double() - self.originals.double()).square().mean() / 255**2)


def open_space(opened: Export, steps: int | None, spacing: samplers.Spacing = "uniform") -> Space:
    """The latents of an export. A diffusion model with captions is told none.

    Args:
        steps: evaluations of a diffusion model each way; None = all of its times.

    Raises:
        UserError: a stage without latents of pictures, steps for one that takes none, or more than it has times.
    """
    stage = opened.stage
    if isinstance(stage, vae.Stage):
        if steps is not None:
            raise UserError("steps: for diffusion models, and 'vae' is none; leave it out")
        return Space(stage.latents(opened.nets), 0)
    if not isinstance(stage, ddpm.Stage):
        raise UserError(f"{opened.folder}: stage '{opened.name}' has no latents to walk in; give a vae or a ddpm")
    levels, net = stage.diffusion.alphas_cumprod, opened.nets["model"]
    samplers.times(levels, steps, spacing)  # refused here rather than after the first picture

    def predict(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor | None]:
        text = stage.empty_caption(x.device).expand(len(x), -1) if stage.config.text_length else None
        return stage.predict(net, x, times, text)

    walk = {"steps": steps, "spacing": spacing}
    to_latents = partial(samplers.encode, predict, levels, **walk)
    to_maps = partial(samplers.decode, predict, levels, **walk)
    codec = Latents(
        net,
        encode=lambda images: to_latents(stage.maps(net, images)),
        decode=lambda latents: stage.pictures(net, to_maps(latents)),
        shape=stage.config.map_shape,
        image_size=stage.config.image_size,
    )
    return Space(codec, len(levels))


def between_seeds(space: Space, seeds: Tensor, count: int) -> Paths:
    """From what each of the seeds int64 [B + 1] draws to the next. Raises UserError: fewer than 2 pictures."""
    latents = normal_noise(seeds, space.noise, math.prod(space.codec.shape)).view(-1, *space.codec.shape)
    return Paths(_along(space, latents[:-1], latents[1:], count), None)


def between_images(space: Space, images: Tensor, count: int) -> Paths:
    """From each of the pictures uint8 [B + 1, 3, S, S] to the next. Raises UserError: fewer than 2 pictures."""
    latents = space.codec.encode(images)
    originals = torch.stack([images[:-1], images[1:]], dim=1)
    return Paths(_along(space, latents[:-1], latents[1:], count), originals)


def _along(space: Space, start: Tensor, end: Tensor, count: int) -> Tensor:
    path = samplers.interpolate(start, end, count)
    pictures = space.codec.decode(path.flatten(0, 1)).cpu()
    return pictures.unflatten(0, (len(start), count))
