"""prepare.py: exact area means, scaled decoding that finds the same damage, hashes that survive recompression."""

import io

import numpy as np
import pytest
from PIL import Image

from dalle_scale.curation import image_prepare
from dalle_scale.data import transforms
from dalle_scale.data.decode import BadSample, decode


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with structure at every scale."""
    rng = np.random.default_rng(seed)
    sheet = np.zeros((height, width, 3))
    for octave in range(1, 8):
        noise = rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        sheet += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / 1.6**octave
    return np.clip((sheet - sheet.mean()) / sheet.std() * 50 + 128, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def any_size(width: int, height: int) -> None:
    pass


def test_large_jpegs_are_decoded_small_and_look_the_same(monkeypatch):
    sides = []

    def square(pixels, size):
        sides.append(min(pixels.shape[:2]))
        return np.ascontiguousarray(transforms.square(pixels, size))

    monkeypatch.setattr(image_prepare, "square", square)
    for side, decoded in {127: 127, 128: 64, 255: 128, 256: 64, 300: 75, 512: 64, 600: 75}.items():
        pixels = scene(side, side + 40)
        image_file = image_prepare.prepare(jpeg(pixels), 32, any_size)
        assert sides.pop() == decoded and decoded >= 64
        difference = decode(image_file.data).astype(int) - transforms.square(decode(jpeg(pixels)), 32)
        assert np.abs(difference).mean() < 5
        assert (image_file.width, image_file.height, image_file.kind) == (side + 40, side, "jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = scene(160, 240)
    data = jpeg(pixels, exif=exif)
    image_file = image_prepare.prepare(data, 32, any_size)
    assert (image_file.width, image_file.height) == ((240, 160) if orientation < 5 else (160, 240))
    assert decode(data, factor=2).shape == ((80, 120, 3) if orientation < 5 else (120, 80, 3)), "as large ones are read"
    upright = transforms.square(decode(data), 32).astype(int)
    assert np.abs(decode(image_file.data) - upright).mean() < 5
    assert np.abs(decode(image_file.data)[::-1] - upright).mean() > 10, "this scene is not symmetric"


def test_damage_is_found_at_any_scale():
    """Cut off or with a byte changed, a file is refused when it is decoded small if and only if it is in full."""
    data = jpeg(scene(300, 300), quality=70)
    rng = np.random.default_rng(0)
    damaged = [data[:length] for length in range(2, len(data), len(data) // 40)]
    for place in rng.integers(600, len(data) - 2, 120):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    refused = 0
    for file in damaged:
        verdicts = []
        for size in (None, 32):
            try:
                image_prepare.prepare(file, size, any_size)
                verdicts.append("")
            except BadSample as error:
                verdicts.append(str(error))
        assert bool(verdicts[0]) == bool(verdicts[1]), verdicts
        refused += bool(verdicts[0])
    assert 40 < refused < len(damaged)


def test_files_stay_as_they_are_where_they_can():
    small, other = scene(32, 32), scene(40, 32)
    for file, kind in ((jpeg(small), "jpg"), (png(small), "png")):
        for size in (None, 32):
            image_file = image_prepare.prepare(file, size, any_size)
            assert (image_file.data, image_file.kind) == (file, kind)
    assert np.array_equal(decode(image_prepare.prepare(png(other), 32, any_size).data), other[4:36])


def test_size_is_judged_before_anything_is_decoded():
    data = bytearray(jpeg(scene(64, 48)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\x40\x00\x40\x00"  # says 16,384 x 16,384
    for size in (None, 32):
        with pytest.raises(BadSample, match="too many pixels"):
            image_prepare.prepare(bytes(data), size, any_size)

    def none(width: int, height: int) -> None:
        raise BadSample(f"{width} x {height}")

    with pytest.raises(BadSample, match="16384 x 16384"):
        image_prepare.prepare(bytes(data), 32, none)
    with pytest.raises(BadSample, match="unknown image format"):
        image_prepare.prepare(b"<html>", 32, any_size)


def test_hash_is_a_cosine_transform():
    """Against the transform in floating point, of means that are taken in full."""
    waves = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
    for seed in range(10):
        pixels = scene(128, 192, seed)
        luma = pixels @ np.array([0.299, 0.587, 0.114])
        cells = luma.reshape(32, 4, 32, 6).mean(axis=(1, 3))
        coefficients = (waves @ cells @ waves.T).ravel()
        expected = sum(1 << place for place in np.flatnonzero(coefficients > np.sort(coefficients)[31]))
        assert (image_prepare.perceptual_hash(pixels) ^ int(expected)).bit_count() <= 2
        assert image_prepare.perceptual_hash(pixels).bit_count() == 32


def test_hash_survives_recompression_and_resizing_and_tells_images_apart():
    hashes = []
    for seed in range(12):
        pixels = scene(240, 320, seed)
        own = image_prepare.perceptual_hash(pixels)
        smaller = np.asarray(Image.fromarray(pixels).resize((160, 120), Image.Resampling.LANCZOS))
        for changed in (decode(jpeg(pixels, quality=50)), smaller, (pixels * 0.95).astype(np.uint8)):
            assert (own ^ image_prepare.perceptual_hash(changed)).bit_count() <= 4
        hashes.append(own)
    distances = [(a ^ b).bit_count() for at, a in enumerate(hashes) for b in hashes[:at]]
    assert min(distances) > 12
    assert image_prepare.perceptual_hash(np.full((1, 1, 3), 7, np.uint8)) == image_prepare.perceptual_hash(
        np.full((50, 9, 3), 7, np.uint8)
    )
