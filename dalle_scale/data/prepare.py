"""A picture's file as it lies in a shard: decoded once, strictly, and stored as it is or as a small square.

A JPEG much larger than the square is decoded at 1/2, 1/4 or 1/8 of its size, which leaves out most of the inverse
transform and of the colour conversion, but not the entropy decoding, so damage is found all the same. The decoded side
is at least twice the square's; the rest is an exact area mean.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag

from dalle_scale.data.decode import MAX_PIXELS, Pixels, decode, extension
from dalle_scale.data.reader import BadSample

JPEG_QUALITY = 95
HASH_SIDE = 32  # of the grey picture that the perceptual hash is made of
_HASH_SAMPLES = 4  # pixels a cell of it, along a side, where there are as many
_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Prepared:
    """A picture, ready for a shard."""

    kind: str  # extension of the member
    data: bytes
    width: int  # of the source in pixels, upright
    height: int
    perceptual_hash: int  # 64 bits


def prepare(data: bytes, size: int | None, check_size: Callable[[int, int], None]) -> Prepared:
    """Decode a picture file and make it what is stored.

    Args:
        size: store the centre square, resized to this side in pixels; None stores every file as it is.
        check_size: is given width and height before anything is decoded; raises BadSample to leave the picture out.

    Raises:
        BadSample: of no known format, damaged, more than `decode.MAX_PIXELS` pixels, or left out by `check_size`.
    """
    kind = extension(data)
    if not kind:
        raise BadSample("unknown image format")
    pixels = None
    if kind == "jpg":
        width, height, is_simple = _jpeg_header(data)
        check_size(width, height)
        factor = _factor(min(width, height), size) if is_simple else 1
        if factor > 1 and not _is_turned(data):
            pixels = _decode_scaled(data, width, height, factor)
    if pixels is None:
        pixels = decode(data)
        height, width, _ = pixels.shape
        check_size(width, height)
    hashed = perceptual_hash(pixels)
    if size is not None and (height, width) != (size, size):
        kind, data = encode(square(pixels, size), kind)
    return Prepared(kind, data, width, height, hashed)


def encode(pixels: Pixels, kind: str) -> tuple[str, bytes]:
    """Pixels as a file: JPEG where the original was one, else PNG, which loses nothing."""
    if kind == "jpg":
        return kind, simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444", fastdct=False)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "png", file.getvalue()


def square(pixels: Pixels, size: int) -> Pixels:
    """The centre square of a picture [H, W, 3], area-resized to [size, size, 3]: `transforms.square`, which may differ
    by one level where a mean lies between two, in a third of the time."""
    height, width, _ = pixels.shape
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    pixels = pixels[y : y + side, x : x + side]
    if side == size:
        return np.ascontiguousarray(pixels)
    lines = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).reshape(side, side * 3).float()
    tall = _means(lines, side, size).reshape(size, side, 3).transpose(0, 1).reshape(side, size * 3)
    wide = _means(tall, side, size).reshape(size, size, 3).transpose(0, 1)
    return wide.round().to(torch.uint8).contiguous().numpy()


def perceptual_hash(pixels: Pixels) -> int:
    """64 bits that stay mostly the same when a picture [H, W, 3] is resized, recompressed or slightly recoloured.

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


def _jpeg_header(data: bytes) -> tuple[int, int, bool]:
    """Width, height, and whether simplejpeg decodes the colour space."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
    except ValueError as error:
        raise BadSample(f"cannot decode: ValueError: {error}") from None
    return width, height, space in ("RGB", "YCbCr", "Gray")


def _factor(side: int, size: int | None) -> int:
    """How much smaller a picture is decoded; powers of two, which have fast code."""
    return next((factor for factor in (8, 4, 2) if size is not None and side >= 2 * size * factor), 1)


def _is_turned(data: bytes) -> bool:
    """Whether EXIF says that the picture is not upright; `decode` then turns it."""
    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as header:
            return int(header.getexif().get(_ORIENTATION, 1)) != 1
    except Exception:  # damaged; `decode` says how
        return True


def _decode_scaled(data: bytes, width: int, height: int, factor: int) -> Pixels:
    if width * height > MAX_PIXELS:
        raise BadSample(f"too many pixels: {width} x {height}, the limit is {MAX_PIXELS}")
    smaller = {"min_width": -(-width // factor), "min_height": -(-height // factor), "min_factor": factor}
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **smaller)
    except Exception as error:  # a decoder that meets damage raises whatever it likes
        raise BadSample(f"cannot decode: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    return pixels


def _means(lines: Tensor, side: int, size: int) -> Tensor:
    """Means of lines [side, m] over `size` intervals of equal width: [size, m]."""
    index, starts, weights = _intervals(side, size)
    return embedding_bag(index, lines, starts, mode="sum", per_sample_weights=weights)


@lru_cache(maxsize=256)
def _intervals(side: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For `size` equal intervals of 0 .. side: the lines that each touches, where its part of these starts [size], and
    the share of each line."""
    low, high = np.arange(size) * side, np.arange(1, size + 1) * side  # in units of 1 / size
    first, behind = low // size, -(-high // size)
    counts = behind - first
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    index = np.arange(counts.sum()) - np.repeat(starts - first, counts)
    shared = np.minimum(np.repeat(high, counts), (index + 1) * size) - np.maximum(np.repeat(low, counts), index * size)
    weights = (shared / side).astype(np.float32)
    return torch.from_numpy(index), torch.from_numpy(starts), torch.from_numpy(weights)
