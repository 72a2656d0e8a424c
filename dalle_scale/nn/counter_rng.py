"""Noise of a sample as a pure function of its seed: counter-based, with no generator and no state.

What a sample samples does not depend on its batch, rank, world size or how many numbers are asked for. Bits are equal
on every device; the logarithms and the like that follow may differ in the last place between kinds of device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_AT_ONCE = 1 << 16  # positions, on CPUs: what comes in between stays in the cache
_MIX_64 = 0xBF58476D1CE4E5B9  # a multiplier of the splitmix64 finalizer


def uniform_noise(seeds: Tensor, step: int | Tensor, count: int) -> Tensor:
    """Uniform noise fp32 [B, count] in the open interval (0, 1), a pure function of (seed, step, position).

    A number is a 32-bit hash of (hash of the position) xor (hash of seed and step), of which 23 bits are kept: the
    values are (n + 1/2) / 2^23, exact in fp32 and symmetric about 1/2.

    Args:
        seeds: int64 [B], one a sample.
        step: step number; or int64 [B], one a sample.
        count: numbers per sample, below 2^31.
    """
    assert count < 1 << 31
    keys = _keys(seeds, step)[:, None]
    if seeds.device.type != "cpu" or count <= _AT_ONCE:
        return _uniform(_positions(count, seeds.device) ^ keys)
    noise = torch.empty(len(seeds), count)
    for first in range(0, count, _AT_ONCE):
        places = torch.arange(first, min(first + _AT_ONCE, count), dtype=torch.int32)
        noise[:, first : first + _AT_ONCE] = _uniform(mix32(places) ^ keys)
    return noise


def _uniform(words: Tensor) -> Tensor:
    """fp32 numbers of 32-bit words, which are overwritten."""
    # 23 bits and a half: never 0 or 1, where the functions that follow are infinite
    return (mix32(words) >> 9).bitwise_and_(0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


def normal_noise(seeds: Tensor, step: int, count: int) -> Tensor:
    """Standard normal noise fp32 [B, count], a pure function of (seed, step, position); arguments of `uniform_noise`.

    The inverse of the distribution function at uniform noise, one uniform number each; none lies beyond 5.3.
    """
    return uniform_noise(seeds, step, count).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))


@lru_cache(maxsize=2)
def _positions(count: int, device: torch.device) -> Tensor:
    """int32 [count]: the hash of each position."""
    return mix32(torch.arange(count, dtype=torch.int32, device=device))


def _keys(seeds: Tensor, step: int | Tensor) -> Tensor:
    """int32 [B]: one key per (seed, step)."""
    steps = step * signed(_GOLDEN, 64) if isinstance(step, Tensor) else signed(step * _GOLDEN, 64)
    key = (seeds + steps) * signed(_MIX_64, 64)
    key = (key ^ (key >> 31)) * signed(_GOLDEN, 64)
    return mix32((key >> 32).to(torch.int32))


def mix32(bits: Tensor) -> Tensor:
    """A bijective hash of 32-bit words (the "lowbias32" constants of C. Wellons), in place on int32.

    Shifts of int32 copy the sign bit down; the masks take those copies off again.
    """
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= signed(0x7FEB352D, 32)
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= signed(0x846CA68B, 32)
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


def signed(value: int, bits: int) -> int:
    """The two's complement integer with the lowest `bits` bits of `value`."""
    value %= 1 << bits
    return value - (1 << bits) if value >> (bits - 1) else value
