"""AdamW over 16-bit parameters without an fp32 copy of them, with 16-bit moments (DALL-E, arXiv 2102.12092, App. D).

A step is often smaller than half the distance between two neighbouring 16-bit numbers, and rounding to nearest
would lose it every time. It is kept by rounding stochastically, so that the expectation is right, or by compensated
summation: what rounding took off is remembered in 16 bits more and added to the next step.

Bytes a parameter, with its gradient: 8 (parameter 2, gradient 2, moments 2 + 2), compensated 10. Parameters in fp32
(in the paper gains, biases and embeddings) have fp32 moments and ordinary rounding in the same optimizer: 16 bytes.

On a GPU a step is one kernel (adam16_kernel.py), elsewhere torch's operations; the bits are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dalle_scale.engine.adam16_step import Formats, Keys, StepCoefficients
from dalle_scale.nn.float_formats import BFLOAT16, FLOAT16, MEAN, VARIANCE, SmallFloat, random_bits

States = Literal["paper", "bf16", "fp32"]
Rounding = Literal["stochastic", "compensated", "nearest"]

# Values updated at a time. On a CPU few, for its caches, and because they are in fp32 meanwhile, some 60 bytes a value;
# elsewhere many, for fewer kernels. Divides 2^32. The results do not depend on it
CHUNK, CHUNK_ON_CPU = 1 << 24, 1 << 17

_PARAMETERS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_MOMENTS: dict[str, tuple[SmallFloat | None, SmallFloat | None]] = {  # of 16-bit parameters; None is fp32
    "paper": (MEAN, VARIANCE),
    "bf16": (BFLOAT16, BFLOAT16),
    "fp32": (None, None),
}


class AdamW16(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction, as torch.optim.AdamW, over bf16, fp16 and fp32 parameters.

    The variance is clipped by value before it steps parameters or is stored (Sec. 2.3).

    Every state tensor is flat and of the parameter's own dtype, whatever its bits mean: `load_state_dict` converts
    state tensors to that dtype, which would turn packed bits, or fp32 values, into other numbers. So a state has the
    same bits after it was saved and loaded. A moment in fp32 of a 16-bit parameter is two values a number.

    A step of an element is a chain of single fp32 operations, so it does not depend on how parameters are cut into
    tensors or chunks; only the noise of stochastic rounding depends on an element's position in its tensor.

    Args:
        groups: parameters or param groups. A group may set lr, betas, eps, weight_decay and gradient_divisor of its
            own. Gradients are divided by gradient_divisor in fp32 before anything else: what scaled them against
            underflow in 16 bits, or clips their norm, is undone without one. It may be set anew before every step.
        states: moments of 16-bit parameters: "paper" is mean 1-6-9 and variance 0-6-10; or both bf16, or both fp32.
        rounding: of 16-bit parameters. Their moments are rounded to nearest with "nearest", else stochastically: with
            beta2 near 1 the changes of the variance, too, are smaller than half a step of its format.
        variance_clip: largest variance.
        seed: of stochastic rounding. Ranks that hold copies of the same parameters need the same seed; ranks that hold
            different slices should have different ones.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        states: States = "paper",
        rounding: Rounding = "stochastic",
        variance_clip: float = 5.0,
        seed: int = 0,
    ) -> None:
        assert states in get_args(States) and rounding in get_args(Rounding) and variance_clip > 0
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "gradient_divisor": 1.0}
        super().__init__(groups, defaults)
        self.moments, self.rounding, self.variance_clip, self.seed = _MOMENTS[states], rounding, variance_clip, seed
        self.skip = False  # set from outside where a step must not be taken

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        assert closure is None
        for group in [] if self.skip else self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of one tensor, chunk by chunk."""
        assert parameter.is_contiguous() and parameter.grad is not None, "parameters are updated as flat memory"
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        short = parameter.dtype in _PARAMETERS
        forms = (*(self.moments if short else (None, None)), _PARAMETERS.get(parameter.dtype))
        moments = _opened(state["mean"], forms[0]), _opened(state["variance"], forms[1])
        tensors = parameter.view(-1), parameter.grad.reshape(-1), *moments, state.get("compensation")
        numbers = self._numbers(state["step"], group)
        update = _update_on(parameter.device)
        chunk = CHUNK_ON_CPU if parameter.device.type == "cpu" else CHUNK
        for start in range(0, parameter.numel(), chunk):
            parts = [None if tensor is None else tensor[start : start + chunk] for tensor in tensors]
            update(*parts, forms, self._keys(state, start, forms), start, numbers)

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Zeros, which are the code of 0 in every format."""
        short = parameter.dtype in _PARAMETERS
        state["step"] = 0
        # Tells the noise of the tensors apart; as a state it outlives a checkpoint. DeepSpeed makes empty states
        state["stream"] = sum("stream" in other for other in self.state.values())
        lengths = dict.fromkeys(("mean", "variance"), 2 if short and self.moments[0] is None else 1)
        if short and self.rounding == "compensated":
            lengths["compensation"] = 1
        for name, values in lengths.items():
            state[name] = torch.zeros(values * parameter.numel(), dtype=parameter.dtype, device=parameter.device)

    def _numbers(self, step: int, group: dict[str, Any]) -> StepCoefficients:
        """Those of step number `step`."""
        beta1, beta2 = group["betas"]
        return StepCoefficients(
            gradient_scale=1 / group["gradient_divisor"],
            mean_kept=beta1,
            mean_new=1 - beta1,
            variance_kept=beta2,
            variance_new=1 - beta2,
            variance_clip=self.variance_clip,
            deviation_scale=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
            rate=group["lr"] / (1 - beta1**step),
            weights_kept=1 - group["lr"] * group["weight_decay"],
        )

    def _keys(self, state: dict[str, Any], start: int, forms: Formats) -> Keys:
        """Of the noise that rounds mean, variance and parameters from position `start` on; None rounds to nearest."""
        stochastic = (self.rounding != "nearest", self.rounding != "nearest", self.rounding == "stochastic")
        words = (self.seed, state["stream"], state["step"], start >> 32)
        wanted = [form is not None and noisy for form, noisy in zip(forms, stochastic, strict=True)]
        return tuple(_key(*words, purpose) if want else None for purpose, want in enumerate(wanted))


def _key(*words: int) -> int:
    """A hash of integers, 0 to 2^32 - 1."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=4).digest(), "little")


def _opened(stored: Tensor, form: SmallFloat | None) -> Tensor:
    """The memory of a state as what is in it: codes, or without `form` fp32."""
    return stored.view(torch.float32 if form is None else torch.int16)


def _read(stored: Tensor, form: SmallFloat | None) -> Tensor:
    """Opened states as fp32, a copy."""
    return stored.clone() if form is None else form.unpack(stored)


def _write(stored: Tensor, values: Tensor, form: SmallFloat | None, noise: Tensor | None) -> None:
    """fp32 values to opened states."""
    stored.copy_(values if form is None else form.pack(values, noise))


def _update_on(device: torch.device) -> Callable[..., None]:
    """The fused form of a step on a GPU, where triton comes with torch; the plain form elsewhere."""
    if device.type != "cuda":
        return _update
    from dalle_scale.engine import adam16_kernel

    return adam16_kernel.update


def _update(
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
    """One step of [values] in place; mean and variance are opened. forms, keys: of mean, variance and weights.

    A chain of single operations in fp32, each rounded: adam16_kernel.py has the same in the same order.
    """
    noise = [None if key is None else random_bits(key, start, len(weights), weights.device) for key in keys]
    gradient = gradient.float() * numbers.gradient_scale
    first = _read(mean, forms[0]).mul_(numbers.mean_kept).add_(gradient * numbers.mean_new)
    second = _read(variance, forms[1]).mul_(numbers.variance_kept).add_(gradient.square_().mul_(numbers.variance_new))
    second.clamp_(max=numbers.variance_clip)
    _write(mean, first, forms[0], noise[0])
    _write(variance, second, forms[1], noise[1])
    deviation = second.double().sqrt_().float()  # the nearest number; torch's root of fp32 is one off at times on CPUs
    change = first.mul_(numbers.rate).div_(deviation.mul_(numbers.deviation_scale).add_(numbers.eps))
    values = weights.float() if compensation is None else weights.float().add_(compensation.float())
    values = values.mul(numbers.weights_kept).sub_(change)
    _write(_opened(weights, forms[2]), values, forms[2], noise[2])
    if compensation is not None:
        rest = values.sub_(weights.float())  # exact before it is rounded to 16 bits
        _write(_opened(compensation, forms[2]), rest, forms[2], None)
