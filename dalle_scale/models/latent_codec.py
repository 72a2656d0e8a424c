"""A trained net that takes images to continuous latents and back, as the stages after it see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dalle_scale.types import UserError


class Latents:
    """Images to latents and back, a limited number at a time; tensors on any device, answers on the net's."""

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
        """net: put into eval mode.

        encode: uint8 images [B, 3, S, S] -> latents [B, C, side, side], without noise.
        decode: the reverse.
        shape: [C, side, side].
        """
        self.shape, self.image_size = shape, image_size
        self._net, self._encode, self._decode = net.eval(), encode, decode
        self._samples_at_once = samples_at_once

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> latents fp32 [B, C, side, side]."""
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, self.image_size, self.image_size)
        parts = torch.split(images.to(self._device), self._samples_at_once)
        return torch.cat([self._encode(part).float() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, side, side] -> uint8 images [B, 3, S, S]."""
        assert latents.shape[1:] == self.shape
        return torch.cat([self._decode(part) for part in torch.split(latents.to(self._device), self._samples_at_once)])

    @property
    def _device(self) -> torch.device:
        return next(self._net.parameters()).device


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
