"""The latents of DDIM (arXiv 2010.02502, Sec. 5.3, 5.4): images to noise and back, without a sample."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor, nn

from dalle_scale.models.capabilities import Space
from dalle_scale.models.diffusion import samplers
from dalle_scale.models.latent_codec import Latents
from dalle_scale.types import StrictModel


class DDIMOptions(StrictModel):
    """The way to the latents of DDIM and back."""

    steps: int | None = Field(default=None, ge=2, description="evaluations each way; None = all times of the model")
    spacing: samplers.Spacing = Field(default="uniform", description="of the times")


def ddim_space(
    net: nn.Module,
    predict: samplers.Predict,
    alphas_cumprod: Tensor,
    ends: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    shape: tuple[int, int, int],
    image_size: int,
) -> Space:
    """The latents of a diffusion model.

    Args:
        predict: see `samplers.Predict`.
        alphas_cumprod: float64 [T].
        ends: uint8 images -> maps [B, *shape], and back.
    """
    to_maps, to_images = ends

    def codec(options: DDIMOptions) -> Latents:
        how = options.steps, options.spacing
        samplers.times(alphas_cumprod, *how)  # refused here rather than after the first image
        return Latents(
            net,
            encode=lambda images: samplers.encode(predict, alphas_cumprod, to_maps(images), *how),
            decode=lambda latents: to_images(samplers.decode(predict, alphas_cumprod, latents, *how)),
            shape=shape,
            image_size=image_size,
        )

    return Space(DDIMOptions, codec, len(alphas_cumprod))
