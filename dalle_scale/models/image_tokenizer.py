"""A trained net as the `types.ImageTokenizer` that later stages, encoding and sampling see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class FrozenNet:
    """A trained net that takes a limited number of samples at a time, on any device, and answers on its own.

    No gradients, but no inference mode either: codes made inside a training step may be embedded there.
    """

    def __init__(self, net: nn.Module, image_size: int, samples_at_once: int) -> None:
        """net: put into eval mode."""
        self.image_size = image_size
        self._net, self._samples_at_once = net.eval(), max(1, samples_at_once)

    @torch.no_grad()
    def _in_parts(self, function: Callable[..., Tensor], *samples: Tensor) -> Tensor:
        """function(*samples), some of the samples at a time."""
        device = next(self._net.parameters()).device
        parts = [torch.split(tensor.to(device), self._samples_at_once) for tensor in samples]
        return torch.cat([function(*part) for part in zip(*parts, strict=True)])

    def _check_images(self, images: Tensor) -> None:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, self.image_size, self.image_size)


class Tokenizer(FrozenNet):
    """Images to codes and back."""

    def __init__(
        self,
        net: nn.Module,
        encode: Callable[[Tensor], Sequence[Tensor]],
        decode: Callable[[Sequence[Tensor]], Tensor],
        *,
        vocab: int,
        grids: tuple[int, ...],
        image_size: int,
        samples_at_once: int,
    ) -> None:
        """encode: uint8 images [B, 3, S, S] -> codes of each level, int64 [B, h, w].

        decode: the reverse.
        """
        super().__init__(net, image_size, samples_at_once)
        self.vocab, self.grids = vocab, grids
        self._encode, self._decode = encode, decode

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> codes int64 [B, N], level after level, each in raster order."""
        self._check_images(images)
        return self._in_parts(lambda part: flat(self._encode(part)), images)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] of any integer type -> uint8 images [B, 3, S, S]."""
        sizes = [grid**2 for grid in self.grids]
        assert codes.shape[1:] == (sum(sizes),)
        levels = zip(torch.split(codes, sizes, dim=1), self.grids, strict=True)
        return self.decode_grid(*(level.reshape(-1, grid, grid) for level, grid in levels))

    def decode_grid(self, *levels: Tensor) -> Tensor:
        """Codes [B, h, w] of each level, of any size -> uint8 images as much larger as the grids are."""
        return self._in_parts(lambda *part: self._decode(part), *(level.to(torch.int64) for level in levels))


def flat(levels: Sequence[Tensor]) -> Tensor:
    """Codes of each level [B, h, w] -> [B, N], level after level, each in raster order."""
    return torch.cat([level.flatten(1) for level in levels], dim=1)
