"""AdamW over 16-bit parameters without an fp32 copy of them, with 16-bit moments (DALL-E, arXiv 2102.12092, App. D).

An update is often smaller than half the distance between two neighbouring 16-bit numbers, and rounding to nearest
would lose it every time. It is kept by rounding stochastically, so that the expectation is right, or by compensated
summation: what rounding took off is remembered in 16 bits more and added to the next update.

Bytes a parameter, with its gradient: 8 (parameter 2, gradient 2, moments 2 + 2), compensated 10. Parameters in fp32
(in the paper gains, biases and embeddings) have fp32 moments and ordinary rounding in the same optimizer: 16 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dalle_scale.nn.small_floats import BFLOAT16, FLOAT16, MEAN, VARIANCE, SmallFloat, random_bits

States = Literal["paper", "bf16", "fp32"]
Rounding = Literal["stochastic", "compensated", "nearest"]

# Values updated at a time, by kind of device: all of a tensor that is ever in fp32, some 60 bytes a value. On a CPU
# few, for its caches; elsewhere many, for fewer kernels. Divides 2^32. The results do not depend on it
CHUNK, CHUNK_ON_CPU = 1 << 24, 1 << 17

_PARAMETERS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_MOMENTS: dict[str, tuple[SmallFloat | None, SmallFloat | None]] = {  # of 16-bit parameters; None is fp32
    "paper": (MEAN, VARIANCE),
    "bf16": (BFLOAT16, BFLOAT16),
    "fp32": (None, None),
}


class AdamW16(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction, as torch.optim.AdamW, over bf16, fp16 and fp32 parameters.

    The variance is clipped by value before it updates parameters or is stored (Sec. 2.3).

    Every state tensor is flat and of the parameter's own dtype, whatever its bits mean: `load_state_dict` converts
    state tensors to that dtype, which would turn packed bits, or fp32 values, into other numbers. So a state has the
    same bits after it was saved and loaded. A moment in fp32 of a 16-bit parameter is two values a number.

    An update of an element is a chain of single fp32 operations, so it does not depend on how parameters are cut into
    tensors or chunks; only the noise of stochastic rounding depends on an element's position in its tensor.

    Args:
        groups: parameters or param groups. A group may set lr, betas, eps and weight_decay of its own.
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
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments, self.rounding, self.variance_clip, self.seed = _MOMENTS[states], rounding, variance_clip, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One update of one tensor, chunk by chunk."""
        assert parameter.is_contiguous() and parameter.grad is not None, "parameters are updated as flat memory"
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        forms = self.moments if parameter.dtype in _PARAMETERS else (None, None)
        weights, gradient = parameter.view(-1), parameter.grad.reshape(-1)
        mean, variance = _opened(state["mean"], forms[0]), _opened(state["variance"], forms[1])
        chunk = CHUNK_ON_CPU if parameter.device.type == "cpu" else CHUNK
        for start in range(0, len(weights), chunk):
            part = slice(start, start + chunk)
            noise = self._noise(state, start, weights[part], forms)
            moments = _read(mean[part], forms[0]), _read(variance[part], forms[1])
            self._accumulate(*moments, gradient[part].float(), group["betas"])
            _write(mean[part], moments[0], forms[0], noise[0])
            _write(variance[part], moments[1], forms[1], noise[1])
            change = _change(*moments, state["step"], group)
            compensation = state["compensation"][part] if "compensation" in state else None
            _update(weights[part], change, 1 - group["lr"] * group["weight_decay"], compensation, noise[2])

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Zeros, which are the code of 0 in every format."""
        short = parameter.dtype in _PARAMETERS
        state["step"] = 0
        state["stream"] = len(self.state)  # tells the noise of the tensors apart; as a state it outlives a checkpoint
        lengths = dict.fromkeys(("mean", "variance"), 2 if short and self.moments[0] is None else 1)
        if short and self.rounding == "compensated":
            lengths["compensation"] = 1
        for name, values in lengths.items():
            state[name] = torch.zeros(values * parameter.numel(), dtype=parameter.dtype, device=parameter.device)

    def _accumulate(self, mean: Tensor, variance: Tensor, gradient: Tensor, betas: tuple[float, float]) -> None:
        """The moments with one gradient more, in place, all fp32."""
        mean.mul_(betas[0]).add_(gradient * (1 - betas[0]))
        variance.mul_(betas[1]).add_(gradient.square().mul_(1 - betas[1])).clamp_(max=self.variance_clip)

    def _noise(self, state: dict[str, Any], start: int, weights: Tensor, forms: Iterable[Any]) -> list[Tensor | None]:
        """What rounds mean, variance and parameters from position `start` on: random int32 [len(weights)], or None."""
        wanted = [form is not None and self.rounding != "nearest" for form in forms]
        wanted.append(weights.dtype in _PARAMETERS and self.rounding == "stochastic")
        words = (self.seed, state["stream"], state["step"], start >> 32)
        return [
            random_bits(_key(*words, purpose), start, len(weights), weights.device) if want else None
            for purpose, want in enumerate(wanted)
        ]


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


def _change(mean: Tensor, variance: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """What to subtract from the parameters, fp32. Overwrites the moments."""
    beta1, beta2 = group["betas"]
    scale = variance.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return mean.mul_(group["lr"] / (1 - beta1**step)).div_(scale)


def _update(weights: Tensor, change: Tensor, keep: float, compensation: Tensor | None, noise: Tensor | None) -> None:
    """Parameters times `keep` minus `change`, in place."""
    values = weights.float() if compensation is None else weights.float().add_(compensation.float())
    values = values.mul(keep).sub_(change)
    form = _PARAMETERS.get(weights.dtype)
    _write(_opened(weights, form), values, form, noise)
    if compensation is not None:
        compensation.copy_(values.sub_(weights.float()))  # exact before it is rounded to 16 bits
