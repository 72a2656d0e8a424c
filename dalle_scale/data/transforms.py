"""Pixels to training images: crops, exact area resizing, and the two augmentation listings of arXiv 2102.12092.

All randomness comes from the sample's seed. Where an image is smaller than the training size, the paper leaves open
what happens; here it is enlarged (with the same area rule) and nothing is cropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dalle_scale.data.decode import Pixels, decode

_WORD = (1 << 64) - 1


def load(data: bytes, augment: str, seed: int, out: Pixels) -> None:
    """Decode an image file and put it, as a training image, into `out` [S, S, 3]. For `augment` see `transform`.

    Raises:
        BadSample: as `decode`; `out` may then hold anything.
    """
    image = transform(decode(data, out=out), len(out), augment, seed)
    if image is not out:
        out[:] = image


def transform(pixels: Pixels, size: int, augment: str, seed: int) -> Pixels:
    """An image [H, W, 3] as a training image [size, size, 3].

    Args:
        augment: "none" (centre square, no randomness), "dvae" (Listing 1) or "transformer" (Listing 2).
    """
    if augment != "dvae" and pixels.shape == (size, size, 3):  # nothing to crop: shards are mostly built at this size
        return pixels
    if augment == "none":
        return square(pixels, size)
    random_numbers = _random_numbers(seed)
    if augment == "dvae":
        return _listing_1(pixels, size, random_numbers)
    assert augment == "transformer", augment
    return _listing_2(pixels, size, random_numbers)


def square(pixels: Pixels, size: int) -> Pixels:
    """The centre square of an image [H, W, 3], area-resized to [size, size, 3]; edges are mapped onto edges."""
    height, width, _ = pixels.shape
    side = min(height, width)
    pixels = _crop(pixels, (height - side) // 2, (width - side) // 2, side)
    if side == size:
        return pixels
    bounds = np.arange(size + 1) * (side / size)
    return area_resize(pixels, bounds, bounds)


def area_resize(pixels: Pixels, rows: npt.NDArray[np.floating[Any]], columns: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Mean colour of every cell of a grid laid over the image, each pixel weighted by the area it shares.

    Args:
        pixels: [H, W, 3]; pixel (y, x) covers [y, y + 1) x [x, x + 1), the last row and column repeat beyond the edge.
        rows, columns: cell borders in pixels, [h + 1] and [w + 1], increasing.

    Returns:
        [h, w, 3], rounded to the nearest integer.
    """
    height, width, _ = pixels.shape
    h, w = len(rows) - 1, len(columns) - 1
    tall = _cell_means(pixels.reshape(height, width * 3), rows).reshape(h, width, 3)
    turned, out = np.empty((width, 3, h), np.float32), np.empty((h, w, 3), np.uint8)
    for channel in range(3):  # a plane at a time: to transpose triples takes longer than all the rest
        turned[:, channel] = tall[:, :, channel].T
    wide = _cell_means(turned.reshape(width, 3 * h), columns).reshape(w, 3, h)
    np.rint(wide, out=wide)
    for channel in range(3):
        out[:, :, channel] = wide[:, channel].T
    return out


def _cell_means(lines: npt.NDArray[Any], bounds: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Means of lines [n, m] over the k intervals between `bounds` [k + 1]; line i covers [i, i + 1): [k, m]."""
    first = np.floor(bounds[:-1]).astype(np.int64)
    taps = int(np.ceil(np.max(bounds[1:] - first)))  # lines that the widest cell touches
    means = np.zeros((len(first), lines.shape[1]), np.float32)
    for tap in range(taps):
        line = first + tap
        shared = np.minimum(bounds[1:], line + 1) - np.maximum(bounds[:-1], line)
        share = (np.maximum(shared, 0) / np.diff(bounds)).astype(np.float32)
        means += share[:, None] * lines[np.minimum(line, len(lines) - 1)]
    return means


def _listing_1(pixels: Pixels, size: int, random_numbers: Iterator[float]) -> Pixels:
    """Listing 1 (dVAE): random square, random scale, random crop, random horizontal flip."""
    height, width, _ = pixels.shape
    side = min(height, width)
    pixels = _crop(pixels, _pick(random_numbers, 0, height - side), _pick(random_numbers, 0, width - side), side)
    target = _pick(random_numbers, min(side, round(9 / 8 * size)), min(side, round(12 / 8 * size)))
    out = _scaled_crop(pixels, target, size, random_numbers)
    return out[:, ::-1] if _pick(random_numbers, 0, 1) else out


def _listing_2(pixels: Pixels, size: int, random_numbers: Iterator[float]) -> Pixels:
    """Listing 2 (transformer): square near the centre, random scale, random crop; no flip, images may hold text."""
    height, width, _ = pixels.shape
    side = min(height, width)
    y, x = (
        _pick(random_numbers, 3 * slack // 8, max(3 * slack // 8, 5 * slack // 8 - 1))
        for slack in (height - side, width - side)
    )
    target = _pick(random_numbers, size, max(size, min(side, round(9 / 8 * size))))
    return _scaled_crop(_crop(pixels, y, x, side), target, size, random_numbers)


def _scaled_crop(pixels: Pixels, target: int, size: int, random_numbers: Iterator[float]) -> Pixels:
    """Resize a square to `target` (AREA, corners aligned, as TensorFlow has it), then a random crop of `size`.

    Only the cells inside the crop are computed.
    """
    side = len(pixels)
    target = max(target, size)
    y, x = _pick(random_numbers, 0, target - size), _pick(random_numbers, 0, target - size)
    if target == side:
        return _crop(pixels, y, x, size)
    scale = (side - 1) / (target - 1) if side > 1 and target > 1 else side / target
    cells = np.arange(size + 1)
    return area_resize(pixels, (y + cells) * scale, (x + cells) * scale)


def _random_numbers(seed: int) -> Iterator[float]:
    """Random numbers in [0, 1): splitmix64 (Steele, Lea and Flood, 2014). numpy's generators take longer to make than a
    image's crop to choose."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _WORD
        value = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
        yield ((value ^ (value >> 31)) >> 11) * 2.0**-53


def _pick(random_numbers: Iterator[float], low: int, high: int) -> int:
    """The next draw as an integer, uniform in low .. high, both included."""
    return low if low == high else low + int(next(random_numbers) * (high - low + 1))


def _crop(pixels: Pixels, y: int, x: int, side: int) -> Pixels:
    return pixels[y : y + side, x : x + side]
