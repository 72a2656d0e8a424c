"""A trained net that takes images to continuous latents and back, as the stages after it see it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dalle_scale.models.image_tokenizer import FrozenNet
from dalle_scale.types import UserError


class Latents(FrozenNet):
    """Images to latents and back."""

    def __init__(
        self,
        net: nn.Module,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        *,
        shape: tuple[int, int, int],
        image_size: int,
        samples_at_once: int = 64,
    ) -> None:
        """encode: uint8 images [B, 3, S, S] -> latents [B, C, side, side], without noise.

        decode: the reverse.
        shape: [C, side, side].
        """
        super().__init__(net, image_size, samples_at_once)
        self.shape, self._encode, self._decode = shape, encode, decode

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> latents fp32 [B, C, side, side]."""
        self._check_images(images)
        return self._in_parts(lambda part: self._encode(part).float(), images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, side, side] -> uint8 images [B, 3, S, S]."""
        assert latents.shape[1:] == self.shape
        return self._in_parts(self._decode, latents)


def fitting(upstream: object, channels: int, size: int, image_size: int) -> Latents | None:
    """The encoder below a model of latents [channels, size, size] (of pixels: 0), where it fits.

    Raises:
        UserError: it has codes or other shapes, or the model is one of pixels.
    """
    if upstream is None:
        return None
    if not channels:
        raise UserError("tokenizer: given, but this model is one of pixels; leave it out, or set model.latent_channels")
    if not isinstance(upstream, Latents):
        raise UserError("tokenizer: has codes, not latents; give the export of a VAE")
    wanted = {"latent_channels": channels, "latent_size": size, "image_size": image_size}
    theirs = upstream.shape[0], upstream.shape[1], upstream.image_size
    for (name, value), has in zip(wanted.items(), theirs, strict=True):
        if value != has:
            raise UserError(f"model.{name}: {value}, but the encoder has {has}; set it to that")
    return upstream
