"""The update of AdamW16 as one triton kernel: every tensor is read and written once, and fp32 stays in registers.

It gives the bits of `adam16._update`, on which this rests:

- every operation is one of fp32 that IEEE 754 rounds (+ - * / and the square root; `div_rn` and `sqrt_rn`, because
  triton's ordinary ones are approximate), in the same order, subnormal numbers included;
- no multiplication and addition become one operation with one rounding (`OPTIONS`: fusion is off in LLVM and in ptxas);
- formats of 16 bits are packed and unpacked by integer operations, as in nn/float_formats.py, bf16 and fp16 as well;
- the random bits are an integer hash of the position, as in nn/counter_rng.py.

Only the sign and the low bits of a NaN are left to the hardware. Needs triton 3.4 or later, torch 2.8's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dalle_scale.engine.adam16_step import Formats, Keys, StepCoefficients
from dalle_scale.nn.counter_rng import signed
from dalle_scale.types import UserError

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):  # attributes of a constexpr cannot be read
    raise UserError(f"adamw16 needs triton 3.4 or later on a GPU, not {triton.__version__}: install torch 2.8 or later")

OPTIONS = {"enable_fp_fusion": False}
_BLOCK = 1024  # values of one program; the results do not depend on it


def update(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    variance: Tensor,
    compensation: Tensor | None,
    forms: Formats,
    keys: Keys,
    start: int,
    numbers: StepCoefficients,
) -> None:
    """`adam16._update`: one step of [values] in place, fewer than 2^31."""
    count = len(weights)
    own = [None if one is None else _codes(one) for one in (weights, gradient, compensation)]
    words = [None if key is None else signed(key, 32) for key in keys]
    with torch.cuda.device_of(weights):  # triton launches on the current device
        _kernel[(triton.cdiv(count, _BLOCK),)](
            *own, mean, variance, count, signed(start, 32), *words, *numbers, *forms, BLOCK=_BLOCK, **OPTIONS
        )


def _codes(tensor: Tensor) -> Tensor:
    """Codes of 16 bits as int16; fp32 as it is."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)


@triton.jit(do_not_specialize=["start", "mean_key", "variance_key", "weights_key"])
def _kernel(
    weights,
    gradient,
    compensation,
    mean,
    variance,
    count,
    start,
    mean_key,
    variance_key,
    weights_key,
    gradient_scale,
    mean_kept,
    mean_new,
    variance_kept,
    variance_new,
    variance_clip,
    deviation_scale,
    eps,
    rate,
    weights_kept,
    MEAN: tl.constexpr,
    VARIANCE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pointers to int16 where the format (a SmallFloat) is not None, else to fp32; keys are int32 or None."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    position = _mix32((at + start).to(tl.uint32))
    slope = _read(gradient + at, inside, WEIGHTS) * gradient_scale
    first = _read(mean + at, inside, MEAN) * mean_kept + slope * mean_new
    second = _read(variance + at, inside, VARIANCE) * variance_kept + slope * slope * variance_new
    second = tl.where(second > variance_clip, variance_clip, second)  # a NaN stays
    _write(mean + at, first, inside, position, mean_key, MEAN)
    _write(variance + at, second, inside, position, variance_key, VARIANCE)
    change = tl.div_rn(first * rate, tl.sqrt_rn(second) * deviation_scale + eps)
    values = _read(weights + at, inside, WEIGHTS)
    if compensation is not None:
        values += _read(compensation + at, inside, WEIGHTS)
    values = values * weights_kept - change
    rounded = _write(weights + at, values, inside, position, weights_key, WEIGHTS)
    if compensation is not None:
        _write(compensation + at, values - rounded, inside, position, None, WEIGHTS)


@triton.jit
def _read(pointers, inside, FORM: tl.constexpr):
    """fp32 of what is stored; 0 outside."""
    stored = tl.load(pointers, mask=inside, other=0)
    return stored if FORM is None else _unpack(stored.to(tl.int32), FORM)


@triton.jit
def _write(pointers, values, inside, position, key, FORM: tl.constexpr):
    """Stores fp32 values, and gives them as they can be read back."""
    if FORM is None:
        tl.store(pointers, values, mask=inside)
        stored = values
    else:
        codes = _pack(values, position, key, FORM)
        tl.store(pointers, codes.to(tl.int16), mask=inside)
        stored = _unpack(codes, FORM)
    return stored


@triton.jit
def _unpack(codes, FORM: tl.constexpr):
    """`SmallFloat.unpack`, from int32; -0 and NaN get their sign as a bit."""
    width: tl.constexpr = FORM.exponent_bits + FORM.mantissa_bits
    size = codes & ((1 << width) - 1)
    field = size << (23 - FORM.mantissa_bits)
    number = field.to(tl.float32, bitcast=True) * 2.0 ** (127 - FORM.bias)
    bits = tl.where(size >= FORM.infinity, field | 0x7F800000, number.to(tl.int32, bitcast=True))
    if FORM.signed:
        bits |= ((codes >> width) & 1) << 31
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pack(values, position, key, FORM: tl.constexpr):
    """`SmallFloat.pack`, as int32, with the noise of `random_bits`."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    code = tl.minimum(_round(size, position, key, FORM), FORM.infinity - 1)
    nan: tl.constexpr = FORM.infinity | 1 << (FORM.mantissa_bits - 1)
    code = tl.where(size == 0x7F800000, FORM.infinity, code)
    code = tl.where(size > 0x7F800000, nan, code)
    if FORM.signed:
        code |= ((bits >> 31) & 1) << (FORM.exponent_bits + FORM.mantissa_bits)
    else:
        code = tl.where((bits < 0) & (size > 0), nan, code)
    return code


@triton.jit
def _round(size, position, key, FORM: tl.constexpr):
    """`SmallFloat._round`; there is why."""
    field = size >> 23
    mantissa = (size & 0x7FFFFF) | tl.where(field > 0, 1 << 23, 0)
    exponent = tl.maximum(field, 1) - (127 - FORM.bias)
    kept = tl.maximum(exponent, 1)
    shift = kept - exponent + (23 - FORM.mantissa_bits)
    mantissa >>= tl.minimum(tl.maximum(shift - 30, 0), 31)
    shift = tl.minimum(shift, 30)
    unit = 1 << shift
    if key is None:
        mantissa += (unit >> 1) - 1 + ((mantissa >> shift) & 1)
    else:
        noise = _mix32(position ^ key.to(tl.uint32))
        mantissa += noise.to(tl.int32) & (unit - 1)
    return ((kept - 1) << FORM.mantissa_bits) + (mantissa >> shift)


@triton.jit
def _mix32(bits):
    """`noise.mix32` of uint32."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits
