"""A trained net as the `types.ImageTokenizer` that later stages, encoding and sampling see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Tokenizer:
    """Images to codes and back, a limited number at a time. Takes tensors on any device and answers on the net's.

    No gradients, but no inference mode either: codes made inside a training step may be embedded there.
    """

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
        """net: put into eval mode.

        encode: uint8 images [B, 3, S, S] -> codes of each level, int64 [B, h, w].
        decode: the reverse.
        """
        self.vocab, self.grids, self.image_size = vocab, grids, image_size
        self._net, self._encode, self._decode = net.eval(), encode, decode
        self._samples_at_once = max(1, samples_at_once)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] -> codes int64 [B, N], level after level, each in raster order."""
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, self.image_size, self.image_size)
        parts = torch.split(images.to(self._device), self._samples_at_once)
        return torch.cat([flat(self._encode(part)) for part in parts])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, N] of any integer type -> uint8 images [B, 3, S, S]."""
        sizes = [grid**2 for grid in self.grids]
        assert codes.shape[1:] == (sum(sizes),)
        levels = zip(torch.split(codes, sizes, dim=1), self.grids, strict=True)
        return self.decode_grid(*(level.reshape(-1, grid, grid) for level, grid in levels))

    @torch.no_grad()
    def decode_grid(self, *levels: Tensor) -> Tensor:
        """Codes [B, h, w] of each level, of any size -> uint8 images as much larger as the grids are."""
        parts = [torch.split(level.to(self._device, torch.int64), self._samples_at_once) for level in levels]
        return torch.cat([self._decode(part) for part in zip(*parts, strict=True)])

    @property
    def _device(self) -> torch.device:
        return next(self._net.parameters()).device


def flat(levels: Sequence[Tensor]) -> Tensor:
    """Codes of each level [B, h, w] -> [B, N], level after level, each in raster order."""
    return torch.cat([level.flatten(1) for level in levels], dim=1)
