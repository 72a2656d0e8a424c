"""Captions and coarse images as tokens: data that a tiny transformer learns in 1,000 steps. The toy world is nearly
determined by its captions; photographs are not."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_scale.curation.toy import world

VOCABULARY, WORDS = 48, 24  # of captions
SHADES, GRID = 64, 8  # of images: colours of 4x4 pixels
SIZES = {"text_vocab": VOCABULARY, "text_length": WORDS, "image_vocab": SHADES, "grid": GRID, "conv_kernel": 5}


def scenes(count: int) -> tuple[Tensor, Tensor]:
    """Words int64 [count, WORDS], each empty place with its own pad, and shades int64 [count, GRID^2]. Seeded."""
    rng = random.Random(0)
    sampled = [world.sample_scene(rng, rng.choice((1, 2)), held_out=False) for _ in range(count)]
    captions = [world.caption(scene, rng).split()[:WORDS] for scene in sampled]
    vocabulary = {word: index for index, word in enumerate(sorted({word for row in captions for word in row}))}
    assert len(vocabulary) <= VOCABULARY
    images = np.stack([world.render(scene, rng) for scene in sampled])
    return padded([[vocabulary[word] for word in row] for row in captions]), shades(images)


def photographs(tar: Path, count: int) -> tuple[Tensor, Tensor]:
    """The same of the first `count` images, in an order drawn by a seed, of a tar with a folder for each class."""
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")]
        random.Random(0).shuffle(members)
        members = members[:count]
        files = [archive.extractfile(member) for member in members]
        images = [Image.open(file).convert("RGB").resize((4 * GRID, 4 * GRID)) for file in files if file is not None]
    classes = [Path(member.name).parts[0] for member in members]
    numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
    return padded([[numbers[name]] for name in classes]), shades(np.stack([np.asarray(image) for image in images]))


def padded(captions: list[list[int]]) -> Tensor:
    """Words int64 [N, WORDS], each empty place with its own pad."""
    return torch.tensor([[*row, *(VOCABULARY + place for place in range(len(row), WORDS))] for row in captions])


def shades(images: np.ndarray) -> Tensor:
    """Of images uint8 [N, 4 * GRID, 4 * GRID, 3]: int64 [N, GRID^2], four levels of each colour."""
    means = images.reshape(len(images), GRID, 4, GRID, 4, 3).mean(axis=(2, 4))
    levels = (means // 64).astype(np.int64)
    return torch.from_numpy(levels @ np.array([16, 4, 1])).flatten(1)
