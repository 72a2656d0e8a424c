"""Captions and coarse pictures of the toy world as tokens: data that a tiny transformer learns in 1,000 updates."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from dalle_scale.data import toy_world

VOCABULARY, WORDS = 48, 24  # of captions
SHADES, GRID = 64, 8  # of pictures: colours of 4x4 pixels
SIZES = {"text_vocab": VOCABULARY, "text_length": WORDS, "image_vocab": SHADES, "grid": GRID, "conv_kernel": 5}


def scenes(count: int) -> tuple[Tensor, Tensor]:
    """Words int64 [count, WORDS], each empty place with its own pad, and shades int64 [count, GRID^2]. Seeded."""
    rng = random.Random(0)
    drawn = [toy_world.sample_scene(rng, rng.choice((1, 2)), held_out=False) for _ in range(count)]
    captions = [toy_world.caption(scene, rng).split()[:WORDS] for scene in drawn]
    vocabulary = {word: index for index, word in enumerate(sorted({word for row in captions for word in row}))}
    assert len(vocabulary) <= VOCABULARY
    text = [[vocabulary[word] for word in row] for row in captions]
    text = [[*row, *(VOCABULARY + place for place in range(len(row), WORDS))] for row in text]
    pictures = np.stack([toy_world.render(scene, rng) for scene in drawn])
    means = pictures.reshape(count, GRID, 4, GRID, 4, 3).mean(axis=(2, 4))
    levels = (means // 64).astype(np.int64)
    return torch.tensor(text), torch.from_numpy(levels @ np.array([16, 4, 1])).flatten(1)
