"""Captions and images as tokens, sampled by a rule that a transformer can learn, and the least loss it can reach.

A caption is 16 words, and pads. Each word paints one of 4 x 4 tiles of the image with four codes of its own in a
2 x 2 pattern. Of all codes a tenth is then replaced by any code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILES = 4  # along a side of the image
MOST_WORDS = 64
NOISE = 0.1  # share of codes that are replaced


@dataclass(frozen=True)
class Rule:
    """For vocabularies and lengths of a model: at least 16 places for words, and tiles of whole 2 x 2 patterns."""

    text_vocab: int
    text_length: int
    image_vocab: int
    grid: int

    def __post_init__(self) -> None:
        assert self.text_length >= TILES**2 and self.grid % (2 * TILES) == 0 and self.image_vocab >= 4

    @property
    def words(self) -> int:
        """How many different ones there are."""
        return min(MOST_WORDS, self.text_vocab, self.image_vocab // 4)

    def draw(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Captions int64 [samples, text_length], codes int64 [samples, grid^2]; on the CPU, as the generator."""
        words = torch.randint(self.words, (samples, TILES**2), generator=generator)
        pads = self.text_vocab + torch.arange(TILES**2, self.text_length)
        text = torch.cat([words, pads.expand(samples, -1)], dim=1)
        at = torch.arange(self.grid)
        tile = at * TILES // self.grid
        of_place = (tile[:, None] * TILES + tile).flatten()  # which word paints it
        pattern = (2 * (at[:, None] % 2) + at % 2).flatten()
        codes = 4 * words[:, of_place] + pattern
        other = torch.randint(self.image_vocab, codes.shape, generator=generator)
        return text, torch.where(torch.rand(codes.shape, generator=generator) < NOISE, other, codes)

    def least_nats(self, text_weight: float) -> float:
        """The loss, as the stage `dalle` weighs it, of the best possible model: what the rule leaves open."""
        text = TILES**2 * math.log(self.words) / self.text_length
        each = NOISE / self.image_vocab
        expected = 1 - NOISE + each
        codes = -expected * math.log(expected) - (self.image_vocab - 1) * each * math.log(each)
        return text_weight * text + (1 - text_weight) * codes
