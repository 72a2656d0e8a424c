"""Area resizing against a slow exact one, and the listings against their words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_scale.data.transforms import area_resize, square, transform


def slow_area(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixel by pixel: weight = area shared by cell and pixel; the last row and column repeat beyond the edge."""
    height, width, _ = pixels.shape
    out = np.zeros((len(rows) - 1, len(columns) - 1, 3))
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            total = 0.0
            for y in range(height + 3):
                for x in range(width + 3):
                    tall = min(rows[i + 1], y + 1) - max(rows[i], y)
                    wide = min(columns[j + 1], x + 1) - max(columns[j], x)
                    if tall > 0 and wide > 0:
                        out[i, j] += tall * wide * pixels[min(y, height - 1), min(x, width - 1)]
                        total += tall * wide
            out[i, j] /= total
    return out


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 9), width=st.integers(1, 9), data=st.data())
def test_area_resize_is_exact(height, width, data):
    grids = []
    for length in (height, width):
        cells = data.draw(st.integers(1, 6))
        start = data.draw(st.floats(0, 1))
        end = data.draw(st.floats(1.5, length + 1.5))  # beyond the edge, as aligned corners need it
        grids.append(np.linspace(min(start, length / 2), max(end, length / 2 + 1), cells + 1))
    pixels = noise(height, width)
    assert np.abs(area_resize(pixels, *grids) - slow_area(pixels, *grids)).max() <= 0.5 + 1e-3


def test_square_halves_by_block_means_and_keeps_what_fits():
    pixels = noise(8, 8)
    blocks = pixels.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(square(pixels, 4) - blocks).max() <= 0.5
    assert np.array_equal(square(pixels, 8), pixels)
    assert np.array_equal(square(noise(8, 12), 8), noise(8, 12)[:, 2:10])
    assert np.array_equal(square(pixels, 16), pixels.repeat(2, axis=0).repeat(2, axis=1))


def ramp(height: int, width: int) -> np.ndarray:
    """Red = column, green = row, so that a result tells where it was cut."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, 0 * x], axis=2).astype(np.uint8)


def test_listing_1_covers_offsets_scales_and_flips():
    size = 16  # so t is in 18 .. 24
    starts, flips, scales = set(), 0, []
    for seed in range(400):
        out = transform(ramp(100, 140), size, "dvae", seed)
        assert out.shape == (size, size, 3)
        flipped = out[0, 0, 0] > out[0, -1, 0]
        flips += flipped
        out = out[:, ::-1] if flipped else out
        starts.add(int(out[0, 0, 0]))
        scales.append((float(out[-3, 0, 1]) - float(out[0, 0, 1])) / (size - 3))  # off the edge, where pixels repeat
    assert 150 < flips < 250
    assert min(starts) < 8 and max(starts) > 56  # square offset 0 .. 40, then up to 8 of 24 cells
    expected = [99 / (t - 1) for t in range(18, 25)]
    assert {min(range(7), key=lambda k: abs(expected[k] - scale)) for scale in scales} == set(range(7))
    assert max(min(abs(e - s) for e in expected) for s in scales) < 0.1  # two roundings over 13 rows


def test_listing_2_stays_near_the_centre_and_never_flips():
    size = 16  # t is in 16 .. 18
    starts = set()
    for seed in range(300):
        out = transform(ramp(16, 48), size, "transformer", seed)  # side 16: no scaling, the cut is exact
        assert np.array_equal(out[0, :, 0], out[0, 0, 0] + np.arange(size))
        starts.add(int(out[0, 0, 0]))
    assert starts == set(range(3 * 32 // 8, 5 * 32 // 8)), "middle quarter of the slack of 32, upper end excluded"
    seen = {transform(ramp(100, 100), size, "transformer", seed).tobytes() for seed in range(200)}
    assert len(seen) == 1 + 4 + 9, "t = 16: one crop, 17: four, 18: nine"


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_image_of_the_training_size_is_not_resampled(augment):
    pixels = noise(32, 32)
    results = [transform(pixels, 32, augment, seed) for seed in range(20)]
    same = [np.array_equal(result, pixels) for result in results]
    mirrored = [np.array_equal(result[:, ::-1], pixels) for result in results]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert (0 < sum(mirrored) < 20) == (augment == "dvae")


@pytest.mark.parametrize("augment", ["none", "dvae", "transformer"])
def test_small_images_are_enlarged_whole(augment):
    out = transform(np.full((5, 7, 3), 9, np.uint8), 32, augment, 1)
    assert out.shape == (32, 32, 3) and np.all(out == 9)
    assert transform(noise(1, 1), 4, augment, 1).shape == (4, 4, 3)


def test_the_seed_decides():
    pixels = noise(60, 50)
    for augment in ("dvae", "transformer"):
        assert np.array_equal(transform(pixels, 16, augment, 5), transform(pixels, 16, augment, 5))
        assert len({transform(pixels, 16, augment, seed).tobytes() for seed in range(10)}) > 5
