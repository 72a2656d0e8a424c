"""Batches for the tests of the stages that take images, and what codes come to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dalle_scale.types import Batch


def quarters(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Images of four plain quarters, of one of eight colours each: uint8 [count, 3, size, size]."""
    colours = 60 + 130 * torch.randint(2, (count, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
    return colours.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3).to(torch.uint8)


def batch_of(images: Tensor, first_seed: int = 100) -> Batch:
    ids = torch.arange(len(images))
    return {"image": images, "id": ids, "seed": first_seed + ids, "weight": torch.ones(len(images))}


def rows(batch: Batch, index: slice | list[int]) -> Batch:
    return {key: value[index] for key, value in batch.items()}


def same_images(first: Tensor, second: Tensor) -> bool:
    """Equal but for one byte in a hundred, which is one off. Kernels for another batch, or another place in it, round
    otherwise, and a value halfway between two bytes then becomes the other."""
    away = (first.int() - second.int()).abs()
    return first.shape == second.shape and int(away.max()) <= 1 and float(away.double().mean()) <= 0.01


def same_codes(first: Tensor, second: Tensor) -> bool:
    """Equal but for one code in a hundred: of two that are as good, rounding chooses."""
    return first.shape == second.shape and float((first != second).double().mean()) <= 0.01


def assert_usage(result: dict[str, float], codes: Tensor, vocab: int, ending: str = "") -> None:
    """Codes used and perplexity in `result` are those of the codes, counted here."""
    frequencies = torch.bincount(codes.flatten(), minlength=vocab).double() / codes.numel()
    entropy = -sum(f * math.log(f) for f in frequencies.tolist() if f)
    assert result[f"codes_used{ending}"] == float((frequencies > 0).double().mean())
    assert result[f"perplexity{ending}"] == pytest.approx(math.exp(entropy))


def assert_psnr(result: dict[str, float], decoded: Tensor, images: Tensor) -> None:
    """The PSNR in `result` is that of the decoded images, but for their rounding to bytes."""
    error = (decoded.double() - images.double()).square().mean()
    assert result["psnr_db"] == pytest.approx(20 * math.log10(255) - 10 * math.log10(float(error)), abs=1e-2)
