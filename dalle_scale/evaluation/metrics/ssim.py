"""Structural similarity of images (Wang, Bovik, Sheikh and Simoncelli 2004, "Image Quality Assessment: From Error
Visibility to Structural Similarity", Eq. 13 to 16).

torchmetrics' SSIM is another number: it counts windows over reflected borders too. It takes thirty times as long and
seconds to import (tests/nn/test_library_metrics.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 11  # pixels along a side of the Gaussian window
_SIGMA = 1.5  # pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # (K L)^2 with K1 = 0.01, K2 = 0.03 and the range L of bytes


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Mean SSIM of each image: over all windows that lie inside it and over its channels, each compared on its own.

    Nothing is padded and nothing is shrunk first; variances are those of the window's weights, without Bessel's
    correction, as in Eq. 15.

    Args:
        images, references: uint8 [B, C, H, W], H and W at least 11.

    Returns:
        float64 [B] in -1 .. 1; 1 where the images are equal.
    """
    assert images.dtype == references.dtype == torch.uint8 and images.shape == references.shape
    height, width = images.shape[-2:]
    assert min(height, width) >= WINDOW, f"{height} x {width} pixels do not hold a window of {WINDOW} x {WINDOW}"
    rows, columns = _windows(height, images.device), _windows(width, images.device)

    def mean(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    # float64: a variance is a small difference of two large numbers
    x, y = images.double(), references.double()
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windows(length: int, device: torch.device) -> Tensor:
    """The weights of every window along one side, float64 [length - 10, length]: the Gaussian is a product of two, so
    two matrix products apply it, five times as fast as a convolution."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    count = length - WINDOW + 1
    windows = torch.zeros(count, length, dtype=torch.float64, device=device)
    first = torch.arange(count, device=device)[:, None]
    return windows.scatter_(1, first + torch.arange(WINDOW, device=device), weights.expand(count, -1))
