"""Decoding gives upright RGB or a reason, never a guess."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dalle_scale.data.decode import BadSample, decode, extension


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    """An image without symmetry, smooth enough for JPEG."""
    y, x = np.mgrid[0:24, 0:40]
    return np.stack([6 * x, 10 * y, 255 - 3 * (x + y)], axis=2).astype(np.uint8)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(pixels, kind, options):
    data = encoded(Image.fromarray(pixels), kind, **options)
    assert np.array_equal(decode(data), pixels)
    assert extension(data) == kind.lower()


def test_jpeg_agrees_with_pillow(pixels):
    data = encoded(Image.fromarray(pixels), "JPEG", quality=90, subsampling=0)
    reference = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data).astype(int) - reference).max() <= 1
    assert extension(data) == "jpg"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(pixels, kind, orientation):
    undo = {  # how a camera that wrote this tag would have stored the upright image (EXIF 2.3, tag 0x0112)
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](pixels)))
    data = encoded(stored, kind, exif=exif, **({"quality": 98, "subsampling": 0} if kind == "JPEG" else {}))
    result = decode(data)
    assert result.shape == pixels.shape
    assert np.abs(result.astype(int) - pixels).max() <= (8 if kind == "JPEG" else 0)


def test_alpha_is_composited_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 51, 255]  # 0, 1/5 and 1
    expected = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    assert np.array_equal(decode(encoded(Image.fromarray(rgba), "PNG"))[0], expected)


def test_palette_with_transparency_and_grey_with_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=0)
    assert np.array_equal(decode(data)[0], [[255, 255, 255], [40, 50, 60]])
    grey = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA")
    assert np.array_equal(decode(encoded(grey, "PNG"))[0], [[100] * 3, [255] * 3])


def test_grey_and_16_bit_grey():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decode(encoded(Image.fromarray(grey), "PNG")), expected)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(wide, "PNG")), expected)


def test_cmyk_jpeg_is_converted():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(data).astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_files_are_refused(pixels, kind):
    data = encoded(Image.fromarray(pixels), kind)
    for length in range(0, len(data) - 20, 13):
        with pytest.raises(BadSample):
            decode(data[:length])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_image_is_not_decoded_before_its_size_is_known():
    bomb = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(bomb) < 30_000
    with pytest.raises(BadSample, match="too many pixels: 12000 x 12000"):
        decode(bomb)
    with pytest.raises(BadSample, match="too many pixels"):
        decode(encoded(Image.new("RGB", (100, 100)), "JPEG"), max_pixels=9_999)


def test_formats_off_the_list_are_refused(pixels):
    tiff = encoded(Image.fromarray(pixels), "TIFF")
    assert extension(tiff) == ""
    for data in (tiff, b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(BadSample, match="cannot decode"):
            decode(data)
