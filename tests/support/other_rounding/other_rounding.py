"""An unknown processor: what torch computes on CPUs, rounded otherwise.

Real libraries choose a kernel by instruction set, shape, strides, alignment and number of threads, and kernels sum in
different orders. Here a result moves by a pseudo-random share of what such orders may differ by, drawn from exactly
these (not the number of threads) and the place in the result. So the same call on the same memory layout gives the same
bits, and another batch, layout or alignment others.

With this folder on PYTHONPATH torch itself switches it on (importlib's entry points "torch.backends"), in programs that
tests start too. `OTHER_ROUNDING=<number>` draws another processor.

Only rounding is another processor's. Each call takes memory for what it draws and computes beside, so the tests of the
peak of a forward and backward pass fail (activations in tests/test_plan.py).
"""

from __future__ import annotations

import os
import threading
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Sums of products or of values: what rounding may change is a share of the same sum over absolute values.
SUMS = """mm addmm bmm baddbmm addmv dot vdot convolution convolution_backward _slow_conv2d_forward
    sum.dim_IntList sum mean mean.dim cumsum avg_pool2d avg_pool2d_backward upsample_bilinear2d upsample_bicubic2d"""
# Else a share of the result. Functions of one value alone are left out: they are one kernel for all places.
RELATIVE = """logsumexp linalg_vector_norm var.correction std.correction nll_loss_forward
    _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data native_layer_norm native_layer_norm_backward
    native_group_norm native_group_norm_backward native_batch_norm native_batch_norm_backward
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward"""
PROCESSOR = os.environ.get("OTHER_ROUNDING", "1")
HALF = (torch.bfloat16, torch.float16)
inside = threading.local()
kept: list[torch.library.Library] = []


@lru_cache(maxsize=256)
def shares(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-0.5, 0.5) that depend on the call and the place in its result. No tensor is kept: tests
    count those."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return (torch.rand(shape, generator=generator) - 0.5).numpy().copy()


def layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 64
    return [layout(one) for one in value] if isinstance(value, (list, tuple)) else value


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(each(change, one) for one in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def rounded_otherwise(name: str, of_sums: bool) -> Callable[..., Any]:
    """The operator `name` with moved results; its own kernel computes them, and what they may move by."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def run(keys: Any, *given: Any, **named: Any) -> Any:
        if getattr(inside, "now", False):
            return kernel.call_boxed(keys, *given, **named)
        inside.now = True
        try:
            with torch.no_grad():
                return moved(keys, given, named)
        finally:
            inside.now = False

    def moved(keys: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = kernel.call_boxed(keys, *given, **named)
        results = [found] if isinstance(found, Tensor) else found
        exact = found
        if any(isinstance(one, Tensor) and one.dtype in HALF for one in results):  # rounds once, at the end
            given, named = (each(Tensor.float, part) for part in (given, list(named.items())))
            named = dict(named)
            exact = kernel.call_boxed(keys, *given, **named)
        size = kernel.call_boxed(keys, *each(Tensor.abs, given), **named) if of_sums else exact
        exacts, sizes = ([one] if isinstance(one, Tensor) else one for one in (exact, size))
        key = f"{PROCESSOR} {name} {layout((*given, *named.values()))}"
        for index, (result, value, scale) in enumerate(zip(results, exacts, sizes, strict=True)):
            if isinstance(result, Tensor) and result.is_floating_point():
                eps = torch.finfo(value.dtype).eps * (1 if of_sums else 2)
                scale, exactly = scale.abs(), value.abs()
                if of_sums:
                    scale = torch.where(scale == exactly, 0, scale)  # nothing cancels: perhaps a sum of one number
                change = scale * torch.from_numpy(shares(f"{key} {index}", tuple(value.shape))).to(value.dtype) * eps
                result.copy_(value + change.nan_to_num(0.0, 0.0, 0.0))
        return found

    return run


def switch_on() -> None:
    library = torch.library.Library("aten", "IMPL")
    for names, of_sums in ((SUMS, True), (RELATIVE, False)):
        for name in names.split():
            with warnings.catch_warnings():  # that an operator was replaced
                warnings.simplefilter("ignore")
                library.impl(name, rounded_otherwise(name, of_sums), "CPU", with_keyset=True)
    kept.append(library)
