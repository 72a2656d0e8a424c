"""1-6-9 and 0-6-10 against their definition in exact arithmetic; bf16 and fp16, the same code, against torch's own."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dalle_scale.nn.float_formats import BFLOAT16, FLOAT16, MEAN, VARIANCE, SmallFloat, random_bits

CODES = torch.arange(1 << 16).to(torch.int16)
INF, NAN = float("inf"), float("nan")
both = pytest.mark.parametrize("form", [MEAN, VARIANCE], ids=["1-6-9", "0-6-10"])
natives = pytest.mark.parametrize(
    ("form", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)], ids=["bf16", "fp16"]
)


def by_definition(form: SmallFloat, code: int) -> float:
    """The number of a code, from the definition of the format, in Python's floats (exact here)."""
    mantissa, field = code % 2**form.mantissa_bits, code >> form.mantissa_bits
    sign = -1 if form.signed and field >> form.exponent_bits else 1
    field %= 2**form.exponent_bits
    if field == 2**form.exponent_bits - 1:
        return NAN if mantissa else sign * INF
    leading = 0 if field == 0 else 1
    return sign * (leading + mantissa / 2**form.mantissa_bits) * 2.0 ** (max(field, 1) - form.bias)


def positive_numbers(form: SmallFloat) -> list[float]:
    """All finite numbers from 0 up, in order; the place of a number is its code."""
    return [by_definition(form, code) for code in range(((1 << form.exponent_bits) - 1) << form.mantissa_bits)]


def nearest(numbers: list[float], value: float) -> int:
    """The code that `value` >= 0 rounds to: exact distances, ties to even, at most the last."""
    above = bisect_left(numbers, value)
    if above == len(numbers):
        return above - 1
    if above == 0 or numbers[above] == value:
        return above
    down = Fraction(value) - Fraction(numbers[above - 1])
    up = Fraction(numbers[above]) - Fraction(value)
    return above - 1 if down < up or (down == up and above % 2) else above


def sizes(form: SmallFloat, count: int) -> Tensor:
    """Random fp32 over and beyond the range of a format, and fp32 subnormals."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor([form.smallest, form.max]).log2().tolist()
    exponents = torch.empty(count).uniform_(low - 3, high + 2, generator=generator)
    return torch.cat([exponents.exp2(), torch.tensor([0.0, 1e-45, 1e-40, 3e38])])


def codes_of(form: SmallFloat, values: Tensor, noise: Tensor | None = None) -> list[int]:
    return [code & 0xFFFF for code in form.pack(values, noise).tolist()]


def test_ranges() -> None:
    """The paper: the largest 1-6-9 number is slightly less than 16; the variance is clipped at 5."""
    assert (MEAN.max, MEAN.smallest) == (16 - 2**-6, 2**-67)
    assert (VARIANCE.max, VARIANCE.smallest) == (16 - 2**-7, 2**-68)


@both
def test_every_code_is_its_definition_and_comes_back(form: SmallFloat) -> None:
    numbers = form.unpack(CODES)
    want = torch.tensor([by_definition(form, code) for code in range(1 << 16)], dtype=torch.float64)
    assert torch.equal(numbers.isnan(), want.isnan())
    keep = ~want.isnan()
    assert torch.equal(numbers[keep].double(), want[keep])
    assert torch.equal(form.pack(numbers)[keep], CODES[keep])
    noise = random_bits(7, 0, 1 << 16, torch.device("cpu"))
    assert torch.equal(form.pack(numbers, noise)[keep], CODES[keep])  # numbers of the format are never moved
    for back in (form.pack(numbers[~keep]), form.pack(numbers[~keep], noise[~keep])):
        assert form.unpack(back).isnan().all()


@both
def test_rounds_to_the_nearest(form: SmallFloat) -> None:
    numbers, values = positive_numbers(form), sizes(form, 20_000)
    want = [nearest(numbers, value) for value in values.tolist()]
    assert codes_of(form, values) == want
    if form.signed:
        assert codes_of(form, -values) == [code | 0x8000 for code in want]


@both
def test_midpoints_go_to_the_even_code_and_their_neighbours_do_not(form: SmallFloat) -> None:
    numbers = torch.tensor(positive_numbers(form))
    middle, code = (numbers[:-1] + numbers[1:]) / 2, torch.arange(len(numbers) - 1)
    assert (middle.double() * 2 == numbers[:-1].double() + numbers[1:].double()).all()  # fp32 holds them
    even = (code + code % 2).tolist()
    assert codes_of(form, middle) == even
    assert codes_of(form, torch.nextafter(middle, torch.tensor(0.0))) == code.tolist()
    assert codes_of(form, torch.nextafter(middle, torch.tensor(INF))) == (code + 1).tolist()


@both
def test_order_is_kept(form: SmallFloat) -> None:
    values = sizes(form, 50_000)
    values = torch.cat([values, -values] if form.signed else [values]).sort().values
    assert (form.unpack(form.pack(values)).diff() >= 0).all()


@both
def test_ends(form: SmallFloat) -> None:
    """Too large a number is the largest; infinity and NaN are not hidden; nothing negative passes for a number."""
    noise = torch.full((1,), -1, dtype=torch.int32)  # rounds up whatever can be
    for values in ([form.max], [form.max * 1.001], [16.0], [3.4e38]):
        for rng in (None, noise):
            assert form.unpack(form.pack(torch.tensor(values), rng)).tolist() == [form.max]
    special = torch.tensor([INF, NAN, -0.0, -INF, -1.0, -1e-45])
    got = form.unpack(form.pack(special))
    want = [INF, NAN, -0.0, -INF, -1.0, -0.0] if form.signed else [INF, NAN, 0.0, NAN, NAN, NAN]
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=0, equal_nan=True)
    assert got.signbit().tolist()[2] == form.signed
    assert form.unpack(form.pack(special[:2], noise.expand(2))).isfinite().sum() == 0


@natives
def test_native_formats_are_torchs(form: SmallFloat, dtype: torch.dtype) -> None:
    torch.testing.assert_close(form.unpack(CODES), CODES.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    values = sizes(form, 100_000).clamp(max=form.max)
    for signed in (values, -values):
        assert torch.equal(form.pack(signed), signed.to(dtype).view(torch.int16))


@both
def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(form: SmallFloat) -> None:
    """Noise in even steps over what is compared with the bits that fall away gives each probability exactly."""
    numbers, one_octave = positive_numbers(form), 1 << form.mantissa_bits
    for code in (0, 1, 5, one_octave - 1, one_octave, 20_001, len(numbers) - 2):
        low, spacing = numbers[code], numbers[code + 1] - numbers[code]
        for share in (1 / 256, 0.25, 0.5, 0.75, 255 / 256):
            value = low + share * spacing
            dropped = round(math.log2(spacing)) - (math.floor(math.log2(value)) - 23)  # bits
            noise = torch.arange(4096, dtype=torch.int32) << (dropped - 12)
            got = (form.pack(torch.full((4096,), value), noise).int() & 0xFFFF) - code
            assert got.unique().tolist() == [0, 1]
            assert got.sum() == share * 4096


@both
def test_stochastic_rounding_is_unbiased(form: SmallFloat) -> None:
    """The mean error of many values, in units of their spacing, is 0 to five standard errors; nearest rounding of the
    same values between numbers is far from it."""
    count = 400_000
    for low in (form.smallest * 100, 2.0**-40, 3.0):
        spacing = max(form.smallest, 2.0 ** torch.tensor(low).log2().floor().item() * 2.0**-form.mantissa_bits)
        start = torch.round(torch.tensor(low / spacing)) * spacing
        values = (start + 0.3 * spacing).repeat(count)
        noise = random_bits(11, 12345, count, torch.device("cpu"))
        errors = (form.unpack(form.pack(values, noise)) - values) / spacing
        assert abs(errors.double().mean()) < 5 * (0.3 * 0.7 / count) ** 0.5
        assert abs(form.unpack(form.pack(values)) - values)[0] / spacing > 0.29


def test_tiny_values_are_rare_under_stochastic_rounding() -> None:
    """Far below the smallest number: probability 2^-10, as it should, and 0 where it is beyond the noise."""
    noise = random_bits(3, 0, 1 << 20, torch.device("cpu"))
    codes = MEAN.pack(torch.full((1 << 20,), MEAN.smallest * 2**-10), noise)
    assert abs(int(codes.sum()) - 1024) < 5 * 32 and set(codes.tolist()) == {0, 1}
    assert not MEAN.pack(torch.full((1 << 20,), MEAN.smallest * 2.0**-40), noise).any()


def test_random_bits_are_a_function_of_the_position() -> None:
    cpu = torch.device("cpu")
    whole = random_bits(9, 5, 1000, cpu)
    assert torch.equal(random_bits(9, 305, 100, cpu), whole[300:400])
    assert torch.equal(random_bits(9, 5 + (1 << 32), 1000, cpu), whole)
    assert not torch.equal(random_bits(10, 5, 1000, cpu), whole)
    many = random_bits((1 << 32) - 1, (1 << 31) - 500_000, 1_000_000, cpu)
    for bit in range(32):
        assert abs((many >> bit & 1).double().mean() - 0.5) < 0.0025
