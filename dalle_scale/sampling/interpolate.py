"""Images between images, in the latents of an exported VAE or in those of DDIM (arXiv 2010.02502, Sec. 5.3, 5.4).

Latents of both are standard normal where images are sampled from nothing. A path between two follows the arc, which
keeps the length of noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_scale.checkpoint.export import Export
from dalle_scale.config import parse_options
from dalle_scale.models.diffusion import samplers
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.types import LatentCodec, StrictModel, UserError


@dataclass(frozen=True)
class Space:
    """Images to latents and back."""

    codec: LatentCodec
    noise: int  # index of the noise that stands for a seed, the same as in the stage's sampler
    options: StrictModel  # of the way to the latents and back


@dataclass(frozen=True)
class Paths:
    """Images along B paths of N, ends included."""

    images: Tensor  # uint8 [B, N, 3, S, S]
    originals: Tensor | None  # uint8 [B, 2, 3, S, S], the images at the ends where there were any

    @property
    def round_trip_mse(self) -> float | None:
        """Mean squared error of the ends, values 0 .. 1, as in Table 2 of the paper."""
        if self.originals is None:
            return None
        ends = torch.stack([self.images[:, 0], self.images[:, -1]], dim=1)
        return float((ends.double() - self.originals.double()).square().mean() / 255**2)


def open_space(opened: Export, options: Sequence[str] = ()) -> Space:
    """The latents of an export.

    Args:
        options: `key=value`, of the stage's latents.

    Raises:
        UserError: a stage without latents of images, or options that it does not take.
    """
    latents = opened.stage.latent_space(opened.nets)
    if latents is None:
        raise UserError(f"{opened.folder}: stage '{opened.name}' has no latents to walk in; give a vae or a ddpm")
    chosen = parse_options(latents.Options, options)
    return Space(latents.codec(chosen), latents.noise_index, chosen)


def between_seeds(space: Space, seeds: Tensor, count: int) -> Paths:
    """From what each of the seeds int64 [B + 1] samples to the next. Raises UserError: fewer than 2 images."""
    latents = normal_noise(seeds, space.noise, math.prod(space.codec.shape)).view(-1, *space.codec.shape)
    return Paths(_along(space, latents[:-1], latents[1:], count), None)


def between_images(space: Space, images: Tensor, count: int) -> Paths:
    """From each of the images uint8 [B + 1, 3, S, S] to the next. Raises UserError: fewer than 2 images."""
    latents = space.codec.encode(images)
    originals = torch.stack([images[:-1], images[1:]], dim=1)
    return Paths(_along(space, latents[:-1], latents[1:], count), originals)


def _along(space: Space, start: Tensor, end: Tensor, count: int) -> Tensor:
    path = samplers.interpolate(start, end, count)
    images = space.codec.decode(path.flatten(0, 1)).cpu()
    return images.view(len(start), count, *images.shape[1:])
