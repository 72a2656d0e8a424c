"""SSIM against plain loops over windows, and its known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dalle_scale.evaluation.metrics.ssim import ssim


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    """One channel [H, W] each: the formula of the paper, window after window, moments around the mean."""
    weights = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    )
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a = x[top : top + 11, left : left + 11].astype(np.float64)
            b = y[top : top + 11, left : left + 11].astype(np.float64)
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            top_line = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(top_line / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)))
    return float(np.mean(values))


def pair(noise: int, height: int = 17, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and the same with noise, uint8 [3, 3, H, W]."""
    rng = torch.Generator().manual_seed(noise)
    coarse = torch.rand(3, 3, 4, 4, generator=rng) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    other = smooth + noise * torch.randn(smooth.shape, generator=rng)
    return smooth.round().to(torch.uint8), other.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("noise", [1, 20, 200])
def test_against_plain_loops(noise):
    images, references = pair(noise)
    want = [
        np.mean([brute_force(*c) for c in zip(a.numpy(), b.numpy(), strict=True)])
        for a, b in zip(images, references, strict=True)
    ]
    got = ssim(images, references)
    assert got.dtype == torch.float64 and got.shape == (3,)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)
    assert torch.equal(ssim(references, images), got), "symmetric"
    np.testing.assert_allclose(ssim(images[1:2], references[1:2]).numpy(), want[1:2], rtol=1e-9)


def test_known_values():
    images, references = pair(20)
    assert torch.allclose(ssim(images, images), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (ssim(images, references) < 0.9).all()
    black, white = torch.zeros(1, 3, 11, 11, dtype=torch.uint8), torch.full((1, 3, 11, 11), 255, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(black, white).item() == pytest.approx(c1 / (255**2 + c1)), "no variance: the luminance term alone"
    assert ssim(images, 255 - images).max() < 0.3, "a negative"


def test_too_small_for_a_window():
    small = torch.zeros(1, 3, 11, 10, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="11 x 10"):
        ssim(small, small)
