"""Floating-point formats of at most 16 bits, packed and unpacked by integer operations on the bits of fp32.

DALL-E (arXiv 2102.12092, App. D) keeps Adam's running mean in 1-6-9 (sign, exponent and mantissa bits) and the running
variance in 0-6-10. The paper gives the widths and that the largest 1-6-9 number is slightly less than 16; the rest is
our choice. Both formats are IEEE-like: exponent bias 59, subnormals, and the highest exponent kept for infinity and
NaN, which gives 15.984 as the largest number. (Without infinity and NaN, bias 60 would give the same maximum and one
octave more at the bottom; then an overflow could not be distinguished from a number.) 0-6-10 takes the same bias: its
largest number, 15.992, is above the 5 at which the variance is clipped, and its smallest, 2^-68, is the square of
2^-34.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_scale.nn.counter_rng import mix32, signed

_FP32_MANTISSA, _FP32_BIAS, _FP32_INFINITY = 23, 127, 0x7F800000
# Mantissas have 24 bits and noise is added to them in int32: no value is moved further than this
_MAX_SHIFT = 30


@dataclass(frozen=True)
class SmallFloat:
    """An IEEE-like binary format: [sign] exponent mantissa, from the highest bit down. At most 16 bits in all.

    The highest exponent code is infinity (mantissa 0) or NaN, the lowest zero and the subnormals.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool = True

    def __post_init__(self) -> None:
        assert self.signed + self.exponent_bits + self.mantissa_bits <= 16
        assert self.bias <= _FP32_BIAS and self.max < 2.0**128, "every number must be one of fp32"

    @property
    def max(self) -> float:
        """The largest finite number."""
        return (2 - 2.0**-self.mantissa_bits) * 2.0 ** ((1 << self.exponent_bits) - 2 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive number, subnormal; numbers are whole multiples of it."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def infinity(self) -> int:
        """The code of +infinity; those of finite numbers, without the sign, are below it, in order of size."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    def pack(self, values: Tensor, noise: Tensor | None = None) -> Tensor:
        """Codes int16 of fp32 `values`, of the same shape.

        A finite value beyond the largest number becomes the largest number with its sign. Infinity and NaN stay what
        they are; a negative number or -infinity is NaN in a format without sign, -0 is 0 there.

        Args:
            values: fp32.
            noise: None rounds to nearest, ties to the even code. Random int32 of the same shape (all 2^32 values
                equally likely) round stochastically: to one of the two neighbours, with the probability that makes
                the expectation the value itself, to 2^-30 of their distance.
        """
        assert values.dtype == torch.float32
        bits = values.contiguous().view(torch.int32)
        size = bits & 0x7FFFFFFF
        code = self._round(size, noise).clamp_(max=self.infinity - 1)
        special = self.infinity | (size > _FP32_INFINITY).int() << (self.mantissa_bits - 1)
        code = torch.where(size >= _FP32_INFINITY, special, code)
        if self.signed:
            code |= (bits >> 31 & 1) << (self.exponent_bits + self.mantissa_bits)
        else:
            nan = self.infinity | 1 << (self.mantissa_bits - 1)
            code = torch.where((bits < 0) & (size > 0), nan, code)
        return code.to(torch.int16)

    def unpack(self, codes: Tensor) -> Tensor:
        """The numbers fp32 of int16 `codes`, exactly; every NaN code is a NaN."""
        assert codes.dtype == torch.int16
        width = self.exponent_bits + self.mantissa_bits
        size = codes.int() & ((1 << width) - 1)
        # In the place of fp32's own exponent and mantissa the code is its number divided by 2^(127 - bias), also where
        # it is subnormal: scaling by a power of two is exact
        number = (size << (_FP32_MANTISSA - self.mantissa_bits)).view(torch.float32) * 2.0 ** (_FP32_BIAS - self.bias)
        special = (size << (_FP32_MANTISSA - self.mantissa_bits) | _FP32_INFINITY).view(torch.float32)
        number = torch.where(size >= self.infinity, special, number)
        return torch.where(codes.int() >> width & 1 == 1, -number, number) if self.signed else number

    def _round(self, size: Tensor, noise: Tensor | None) -> Tensor:
        """Codes int32, without limit at the top, of numbers whose bits without sign are `size` int32."""
        field = size >> _FP32_MANTISSA
        mantissa = size & ((1 << _FP32_MANTISSA) - 1) | (field > 0).int() << _FP32_MANTISSA
        exponent = field.clamp_(min=1) - (_FP32_BIAS - self.bias)  # code of the exponent; below 1: subnormal
        kept = exponent.clamp(min=1)
        shift = kept - exponent + (_FP32_MANTISSA - self.mantissa_bits)  # mantissa bits that fall away
        mantissa >>= (shift - _MAX_SHIFT).clamp_(0, 31)  # bits that weigh less than the finest step of the noise
        shift.clamp_(max=_MAX_SHIFT)
        unit = torch.ones_like(shift) << shift
        if noise is None:
            mantissa += (unit >> 1) - 1 + (mantissa >> shift & 1)
        else:
            mantissa += noise & (unit - 1)
        # The leading bit of a normal mantissa adds the 1 that is taken off here, and so does a carry
        return ((kept - 1) << self.mantissa_bits) + (mantissa >> shift)


MEAN = SmallFloat(6, 9, bias=59)  # 1-6-9
VARIANCE = SmallFloat(6, 10, bias=59, signed=False)  # 0-6-10
BFLOAT16 = SmallFloat(8, 7, bias=127)
FLOAT16 = SmallFloat(5, 10, bias=15)


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Random int32 [count], a pure function of `key` and of the positions `start` to `start + count`, modulo 2^32.

    The hash of `uniform_noise`: (hash of the position) xor key, hashed again.

    Args:
        key: 0 to 2^32 - 1, itself a hash of all else that the bits depend on.
    """
    positions = torch.arange(count, dtype=torch.int32, device=device).add_(signed(start, 32))
    return mix32(mix32(positions).bitwise_xor_(signed(key, 32)))
