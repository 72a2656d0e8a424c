"""Encoded images to pixels: strict, one decoder a format, nothing repaired.

JPEG goes through simplejpeg (libjpeg-turbo, where every warning is an error), the rest through Pillow with a short list
of formats. The format is sniffed from the content. Size is checked before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from io import BytesIO
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]  # [H, W, 3], RGB

P = ParamSpec("P")
T = TypeVar("T")

MAX_PIXELS = 1 << 26
_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "JPEG")
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange width and height


class BadSample(Exception):
    """Reason why one sample cannot be used. It keeps its slot with weight 0 and becomes a row of the ledger."""


def _strictly(function: Callable[P, T]) -> Callable[P, T]:
    """Whatever is raised becomes BadSample, with a text that repeats.

    A decorator: entering a context manager for each image costs one in a hundred of what decoding does.
    """

    @wraps(function)
    def strict(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except BadSample:
            raise
        except UnidentifiedImageError:  # its text holds an address in memory, and reasons must repeat
            raise BadSample("cannot decode: no image of a known format") from None
        except Exception as error:  # a decoder that meets damage raises whatever it likes
            raise BadSample(f"cannot decode: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None

    return strict


@_strictly
def decode(data: bytes, max_pixels: int = MAX_PIXELS, out: Pixels | None = None, factor: int = 1) -> Pixels:
    """Decode a JPEG, PNG, WebP, GIF (first frame) or BMP file to RGB, upright, on white where it is transparent.

    Args:
        out: contiguous; a JPEG of just this size may be decoded into it, and is then what is returned.
        factor: 2, 4 or 8: a JPEG may come out smaller by this factor, its sides rounded up. That leaves out most of the
            inverse transform and of the colour conversion, but none of the entropy decoding, so damage is found.

    Raises:
        BadSample: unknown format, damaged, or more than `max_pixels` pixels.
    """
    if data.startswith(b"\xff\xd8\xff"):
        height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        _check_size(width, height, max_pixels)
        if space in ("RGB", "YCbCr", "Gray"):
            if factor > 1:
                height, width = -(-height // factor), -(-width // factor)
            elif out is not None and out.shape == (height, width, 3):
                simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=out)
                return _upright(out, data)
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", strict=True, min_height=height, min_width=width, min_factor=factor
            )
            return _upright(pixels, data)
    return _decode_with_pillow(data, max_pixels)


@_strictly
def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of an image as `decode` gives it, upright, by what stands before the pixels.

    Raises:
        BadSample: as `decode`, as far as the header shows.
    """
    if data.startswith(b"\xff\xd8\xff"):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        orientation = _orientation(data)
    else:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            # without it getexif() of a PNG would decode the image
            orientation = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info else 1
    return (height, width) if orientation in _TURNED else (width, height)


def extension(data: bytes) -> str:
    """Member name for an encoded image, from its first bytes; "" if the format is none that `decode` knows."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "bmp" if data.startswith(b"BM") else ""


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"too many pixels: {width} x {height}, the limit is {max_pixels}")


def _upright(pixels: Pixels, data: bytes) -> Pixels:
    """Apply the EXIF orientation, which simplejpeg does not read."""
    orientation = _orientation(data)
    if orientation == 1:
        return pixels
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    # after the transposition: 5 as it is, 6 mirrored left-right, 7 both, 8 mirrored top-bottom
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _orientation(jpeg: bytes) -> int:
    """Orientation of the image in EXIF, 1 (upright) to 8; other numbers mean nothing."""
    if not _has_exif(jpeg):
        return 1
    with Image.open(BytesIO(jpeg), formats=("JPEG",)) as header:
        return int(header.getexif().get(_ORIENTATION, 1))


def _has_exif(jpeg: bytes) -> bool:
    """Whether one of the segments before the image is EXIF; ten times faster than to search the file for the word."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and at + 4 <= len(jpeg):
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0xE1 and jpeg.startswith(b"Exif\0\0", at + 4):
            return True
        elif marker == 0xDA:  # the image begins
            return False
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _decode_with_pillow(data: bytes, max_pixels: int) -> Pixels:
    with Image.open(BytesIO(data), formats=_FORMATS) as image:
        _check_size(image.width, image.height, max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion would clip at 255
            return _grey_16_bit(image)
        if image.mode in ("I", "F"):
            raise BadSample(f"cannot decode: pixel mode {image.mode} has no stated range")
        if image.has_transparency_data:
            return _on_white(image.convert("RGBA"))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_16_bit(image: Image.Image) -> Pixels:
    grey = (np.asarray(image).astype(np.uint32) + 128) // 257
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _on_white(image: Image.Image) -> Pixels:
    """Composite RGBA on white, rounded to the nearest level."""
    rgba = np.asarray(image).astype(np.uint16)
    alpha = rgba[:, :, 3:]
    return ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
