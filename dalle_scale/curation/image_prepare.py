"""An image's file as it lies in a shard: decoded once, strictly, and stored as it is or as a small square.

A JPEG much larger than the square is decoded at 1/2, 1/4 or 1/8 of its size, to a side of at least twice the square's;
the rest is an exact area mean.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from dalle_scale.data.decode import BadSample, Pixels, decode, extension, size_of
from dalle_scale.data.transforms import square

JPEG_QUALITY = 95
HASH_SIDE = 32  # of the grey image that the perceptual hash is made of
_HASH_SAMPLES = 4  # pixels a cell of it, along a side, where there are as many


@dataclass(frozen=True)
class Prepared:
    """An image, ready for a shard."""

    kind: str  # extension of the member
    data: bytes
    width: int  # of the source in pixels, upright
    height: int
    perceptual_hash: int  # 64 bits


def prepare(data: bytes, size: int | None, check_size: Callable[[int, int], None]) -> Prepared:
    """Decode an image file and make it what is stored.

    Args:
        size: store the centre square, resized to this side in pixels; None stores every file as it is.
        check_size: is given width and height before anything is decoded; raises BadSample to leave the image out.

    Raises:
        BadSample: of no known format, damaged, more than `decode.MAX_PIXELS` pixels, or left out by `check_size`.
    """
    kind = extension(data)
    if not kind:
        raise BadSample("unknown image format")
    if kind == "jpg":
        width, height = size_of(data)
        check_size(width, height)
        pixels = decode(data, factor=_factor(min(width, height), size))
    else:
        pixels = decode(data)
        height, width, _ = pixels.shape
        check_size(width, height)
    hashed = perceptual_hash(pixels)
    if size is not None and (height, width) != (size, size):
        kind, data = encode(square(pixels, size), kind)
    return Prepared(kind, data, width, height, hashed)


def encode(pixels: Pixels, kind: str) -> tuple[str, bytes]:
    """Pixels as a file: JPEG where the original was one, else PNG, which loses nothing."""
    pixels = np.ascontiguousarray(pixels)
    if kind == "jpg":
        return kind, simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444", fastdct=False)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "png", file.getvalue()


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that stay mostly the same when an image [H, W, 3] is resized, recompressed or slightly recoloured.

    Bit 8 u + v says whether the coefficient (u, v) of a 32 x 32 cosine transform of the luma is above the median of
    the 8 x 8 lowest. All in integers, so it is the same on every machine.
    """
    height, width, _ = pixels.shape
    step_y, step_x = (max(1, side // (HASH_SIDE * _HASH_SAMPLES)) for side in (height, width))
    few = pixels[::step_y, ::step_x].astype(np.int32)
    luma = (few[:, :, 0] * 77 + few[:, :, 1] * 150 + few[:, :, 2] * 29) >> 8
    rows, columns = (np.arange(HASH_SIDE + 1) * side // HASH_SIDE for side in luma.shape)
    cells = _cell_means(_cell_means(luma, rows).T, columns).T
    waves = _waves()
    coefficients = (waves @ cells @ waves.T).ravel()
    bits = coefficients > np.sort(coefficients)[31]
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _cell_means(lines: npt.NDArray[np.integer[Any]], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """16 times the mean of the lines [n, m] of each cell [32, m]; a cell that is narrower than a line is that line."""
    sums = np.add.reduceat(lines.astype(np.int64), np.minimum(bounds[:-1], len(lines) - 1), axis=0)
    means: npt.NDArray[np.int64] = sums * 16 // np.maximum(np.diff(bounds), 1)[:, None]
    return means


@lru_cache(maxsize=1)
def _waves() -> npt.NDArray[np.int64]:
    """The 8 lowest waves of a cosine transform of length 32, in units of 2**-12: [8, 32]."""
    frequency, place = np.arange(8)[:, None], np.arange(HASH_SIDE)[None]
    waves: npt.NDArray[np.float64] = np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE))
    return np.rint(waves * 4096).astype(np.int64)


def _factor(side: int, size: int | None) -> int:
    """Factor by which an image is decoded smaller; powers of two, which have fast code."""
    return next((factor for factor in (8, 4, 2) if size is not None and side >= 2 * size * factor), 1)
