"""Images from noise with a trained diffusion model: DDPM's ancestral steps, DDIM, DPM-Solver++, and DDIM backwards.

    ancestral   arXiv 2006.11239, Algorithm 2; the variance of each step fixed large (beta), fixed small, or learned
                (arXiv 2102.09672, Eq. 15). Over a part of the times with fixed large it is the sigma-hat of
                arXiv 2010.02502, Table 1.
    ddim        arXiv 2010.02502, Eq. 12 and 16; eta 0 samples no noise, eta 1 is ancestral with fixed small.
    dpm++       arXiv 2211.01095, Algorithm 2: second order, two steps, of the predicted image.

All three are one sum, x' = keep * x + data * x0 + older * x0_before + std * noise, with x0 the image that the model
predicts. The factors are computed in float64 and rounded once; unlike the predicted noise, x0 loses no digits at any
time, whatever it is that the network predicts. A clipped x0 takes the noise that belongs to it: x - sqrt(a) x0 over
sqrt(1 - a), as in the codes of DDPM and of guided diffusion.

Times are 0 .. T - 1, and `alphas_cumprod` float64 [T] holds a(t), the share of the image in the variance. Time -1
is the image itself, a = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dalle_scale.config import parse
from dalle_scale.models.diffusion.process import Variance
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.types import StrictModel, UserError

Method: TypeAlias = Literal["ancestral", "ddim", "dpm++"]
Spacing: TypeAlias = Literal["uniform", "quadratic", "log_snr"]

# (x [B, ...], times int64 [B]) -> predicted x0 [B, ...], not clipped, and where the model learned its variance the
# share in [0, 1] of log beta in the log-variance of each value, [B, ...]; None otherwise
Predict: TypeAlias = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor | None]"]


class Options(StrictModel):
    """Sampling options of diffusion models. One left at None takes the model's own value, or that of DDPM: every
    time, ancestral."""

    method: Method | None = Field(default=None, description="None = as the model was configured")
    steps: int | None = Field(
        default=None, ge=2, description="evaluations of the model, up to its number of times; None = as configured"
    )
    spacing: Spacing | None = Field(default=None, description="of the times; None = log_snr for dpm++, else uniform")
    eta: float | None = Field(default=None, ge=0, le=1, description="of ddim: share of the ancestral noise; None = 0")
    variance: Variance | None = Field(default=None, description="of ancestral; None = as the model was trained")
    clip: bool | None = Field(default=None, description="predicted images to [-1, 1]; None = ancestral only")
    guidance: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="of a model with captions: scale of guidance; 1 = off"
    )

    @model_validator(mode="after")
    def _check_method(self) -> Options:
        for name, value, method in (("eta", self.eta, "ddim"), ("variance", self.variance, "ancestral")):
            if value is not None and self.method not in (None, method):
                raise ValueError(f"{name}: is for method '{method}'; leave it out with '{self.method}'")
        return self

    def resolved(self, num_times: int, learned: bool) -> Options:
        """The same with its defaults written out. learned: whether the model learned its variance.

        Raises:
            UserError: eta or variance of another method.
        """
        method = self.method or "ancestral"
        found = self.model_dump() | {"method": method, "steps": self.steps or num_times}
        found["spacing"] = self.spacing or ("log_snr" if method == "dpm++" else "uniform")
        if method == "ddim":
            found["eta"] = self.eta or 0.0
        if method == "ancestral":
            found["variance"] = self.variance or ("learned" if learned else "fixed_large")
        found["clip"] = method == "ancestral" if self.clip is None else self.clip
        return parse(Options, found, "options")


@dataclass(frozen=True)
class Step:
    """One move of all samples, from `time` to the next of the plan: keep * x + data * x0 + older * x0_before + std * z.

    A learned variance stands in `log_variances`, (small, large), in place of `std`.
    """

    time: int
    keep: float
    data: float
    older: float = 0.0
    std: float = 0.0
    log_variances: tuple[float, float] | None = None


def times(alphas_cumprod: Tensor, steps: int | None = None, spacing: Spacing = "uniform") -> list[int]:
    """The times that a sampler visits, rising, from 0. (arXiv 2010.02502, App. D.2, and its code, for the first two.)

    uniform: floor(i T / steps); where steps divides T, the strides of the code. quadratic: as in the code, the
    squares of even steps up to sqrt(0.8 T). log_snr: nearest to even steps of log(a / (1 - a)), first and last time
    included. Times that repeat are left out, since a step between equal times moves nothing: the last two may give
    fewer than `steps`.

    Raises:
        UserError: more steps than times, or fewer than 2, or no such spacing.
    """
    assert alphas_cumprod.dtype == torch.float64, "single precision loses digits of the schedule"
    num_times = len(alphas_cumprod)
    steps = num_times if steps is None else steps
    if not 2 <= steps <= num_times:
        raise UserError(f"steps: {steps}, but this model has {num_times} times; take 2 to {num_times}")
    if spacing == "uniform":
        found = [index * num_times // steps for index in range(steps)]
    elif spacing == "quadratic":
        root = math.sqrt(0.8 * num_times)
        found = [*(int((index * (root / (steps - 1))) ** 2) for index in range(steps - 1)), int(root**2)]
    elif spacing == "log_snr":
        log_snr = torch.logit(alphas_cumprod.cpu())
        targets = torch.linspace(log_snr[0].item(), log_snr[-1].item(), steps, dtype=torch.float64)
        found = (log_snr - targets[:, None]).abs().argmin(dim=1).tolist()
    else:
        raise UserError(f"spacing: '{spacing}' is none of {', '.join(get_args(Spacing))}")
    return sorted(set(found))


def pairs(visited: Sequence[int]) -> list[tuple[int, int]]:
    """(time, the time after the step) in the order of sampling: falling, the last one (0, -1)."""
    return list(zip(reversed(visited), [*reversed(visited[:-1]), -1], strict=True))


def ancestral_step(time: int, a: float, a_next: float, variance: Variance) -> Step:
    """A sample of q(x at a_next | x at a, x0), a <= a_next (arXiv 2006.11239, Eq. 7), with the variance as named;
    without noise into the image itself."""
    beta = 1 - a / a_next
    keep, data = math.sqrt(1 - beta) * (1 - a_next) / (1 - a), math.sqrt(a_next) * beta / (1 - a)
    if a_next == 1:
        return Step(time, keep, data)
    small = beta * (1 - a_next) / (1 - a)
    if variance == "learned":
        return Step(time, keep, data, log_variances=(math.log(small), math.log(beta)))
    return Step(time, keep, data, std=math.sqrt(beta if variance == "fixed_large" else small))


def ddim_step(time: int, a: float, a_next: float, eta: float) -> Step:
    """arXiv 2010.02502, Eq. 12 with the sigma of Eq. 16; with eta 0 it runs both ways."""
    std = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next)) if eta else 0.0
    keep = math.sqrt((1 - a_next - std**2) / (1 - a))
    return Step(time, keep, math.sqrt(a_next) - keep * math.sqrt(a), std=std)


def dpm_step(time: int, a: float, a_next: float, a_before: float | None) -> Step:
    """arXiv 2211.01095, Algorithm 2. First order (which is DDIM) in the first step, where a_before is None, and into
    the image itself, where log-SNR is infinite."""
    if a_before is None or a_next == 1:
        return ddim_step(time, a, a_next, 0.0)
    before, now, after = (0.5 * math.log(level / (1 - level)) for level in (a_before, a, a_next))
    change = -math.sqrt(a_next) * math.expm1(now - after)
    slope = 0.5 * (after - now) / (now - before)
    return Step(time, math.sqrt((1 - a_next) / (1 - a)), change * (1 + slope), older=-change * slope)


def plan(alphas_cumprod: Tensor, options: Options, learned: bool = False) -> list[Step]:
    """The steps from noise to images.

    Args:
        alphas_cumprod: float64 [T], falling, in (0, 1).
        learned: the model predicts its variance.

    Raises:
        UserError: more steps than times, or a learned variance of a model without.
    """
    options = options.resolved(len(alphas_cumprod), learned)
    if options.variance == "learned" and not learned:
        raise UserError("variance: 'learned', but this model has learned none; take fixed_large or fixed_small")
    levels = [*alphas_cumprod.tolist(), 1.0]  # the last one is that of time -1
    steps: list[Step] = []
    before = None
    for time, after in pairs(times(alphas_cumprod, options.steps, options.spacing or "uniform")):
        a, a_next = levels[time], levels[after]
        if options.method == "ancestral":
            steps.append(ancestral_step(time, a, a_next, options.variance or "fixed_large"))
        elif options.method == "ddim":
            steps.append(ddim_step(time, a, a_next, options.eta or 0.0))
        else:
            steps.append(dpm_step(time, a, a_next, before))
        before = a
    return steps


def sample(
    predict: Predict,
    alphas_cumprod: Tensor,
    seeds: Tensor,
    shape: Sequence[int],
    options: Options | None = None,
    learned: bool = False,
) -> Tensor:
    """Sample images, fp32 [B, *shape], not clipped at the end.

    An image is a function of its seed: the noise of a step comes from (seed, time), that of the start from (seed, T).
    It does not depend on the batch, but for the rounding of `predict`.

    Args:
        predict: see `Predict`; its guidance is the caller's (`guided`).
        alphas_cumprod: float64 [T].
        seeds: int64 [B], one an image.
        shape: of an image.
        learned: the model predicts its variance.

    Raises:
        UserError: as `plan`.
    """
    options = (options or Options()).resolved(len(alphas_cumprod), learned)
    steps = plan(alphas_cumprod, options, learned)
    start = _noise(seeds, len(alphas_cumprod), shape)
    return follow(predict, steps, start, bool(options.clip), seeds)


def _noise(seeds: Tensor, time: int, shape: Sequence[int]) -> Tensor:
    return normal_noise(seeds, time, math.prod(shape)).view(len(seeds), *shape)


@torch.no_grad()
def follow(predict: Predict, steps: Sequence[Step], x: Tensor, clip: bool, seeds: Tensor | None = None) -> Tensor:
    """Samples [B, ...] after all steps, from any x, in its type. Steps that sample no noise need no seeds."""
    older: Tensor | None = None

    def noise(time: int) -> Tensor:
        assert seeds is not None
        return _noise(seeds, time, x.shape[1:]).to(x.dtype)

    for step in steps:
        x0, share = predict(x, torch.full((len(x),), step.time, device=x.device))
        x0 = x0.to(x.dtype)
        if clip:
            x0 = x0.clamp(-1, 1)
        x = step.keep * x + step.data * x0
        if step.older:
            assert older is not None
            x += step.older * older
        if step.log_variances is not None:
            assert share is not None
            small, large = step.log_variances
            x += torch.exp(0.5 * (small + share.to(x.dtype) * (large - small))) * noise(step.time)
        elif step.std:
            x += step.std * noise(step.time)
        older = x0
    return x


def encode(
    predict: Predict, alphas_cumprod: Tensor, images: Tensor, steps: int | None = None, spacing: Spacing = "uniform"
) -> Tensor:
    """Latents of images: DDIM backwards, from x0 to the noise that `decode` makes it from but for the error of both
    (arXiv 2010.02502, Sec. 4.3 and 5.4). Every step predicts at the time it leaves, and the first one, since the model
    knows no time -1, at time 0.

    Args:
        images: [B, ...] in [-1, 1]; the latents have their type.
        steps: evaluations, as in `Options`.

    Raises:
        UserError: more steps than times.
    """
    levels, visited = alphas_cumprod.tolist(), times(alphas_cumprod, steps, spacing)
    # sqrt(a) x + sqrt(1 - a) noise at a = a(0), where the model reads the noise (x - sqrt(a) x0) / sqrt(1 - a) from x
    root = math.sqrt(levels[0])
    first = Step(0, 1 + root, -root)
    rest = [ddim_step(now, levels[now], levels[after], 0.0) for now, after in pairwise(visited)]
    return follow(predict, [first, *rest], images, clip=False)


def decode(
    predict: Predict, alphas_cumprod: Tensor, latents: Tensor, steps: int | None = None, spacing: Spacing = "uniform"
) -> Tensor:
    """Images of latents [B, ...], as from `encode` or `interpolate`: DDIM without noise and without clipping.

    Raises:
        UserError: more steps than times.
    """
    return follow(
        predict, plan(alphas_cumprod, Options(method="ddim", steps=steps, spacing=spacing)), latents, clip=False
    )


def interpolate(start: Tensor, end: Tensor, count: int) -> Tensor:
    """From each latent to another along the arc between them, [B, ...] -> [B, count, ...], both ends included
    (arXiv 2010.02502, App. D.5). Unlike a straight line, it keeps the length of noise.

    Raises:
        UserError: fewer than 2 of a path.
    """
    if count < 2:
        raise UserError(f"count: {count}, but an interpolation has at least its two ends")
    flat = start.flatten(1).double(), end.flatten(1).double()
    angle = torch.arccos(torch.cosine_similarity(*flat).clamp(-1, 1))[:, None]
    along = torch.linspace(0, 1, count, dtype=torch.float64, device=start.device)
    # sin(w angle) / sin(angle), through sinc, which knows the limit for equal latents
    first, last = (w * torch.sinc(w * angle / math.pi) / torch.sinc(angle / math.pi) for w in (1 - along, along))
    path = first[:, :, None] * flat[0][:, None] + last[:, :, None] * flat[1][:, None]
    return path.view(len(start), count, *start.shape[1:]).to(start.dtype)


def guided(
    predict: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    text: Tensor,
    empty: Tensor,
    guidance: float,
) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598), one evaluation of 2 B samples a step: empty + g (caption - empty).

    Of x0, which comes to the same as of the noise: both are the same straight line in what the network predicts. The
    learned variance is that of the caption.

    Args:
        predict: (x, times, text) as `Predict`.
        text: int64 [B, L], captions.
        empty: int64 [L], the caption that says nothing, which the model was trained to know.
        guidance: g; 1 = off, and then `empty` is not evaluated.
    """
    if guidance == 1.0:
        return lambda x, at: predict(x, at, text)
    both = torch.cat([text, empty.expand_as(text)])

    def predict_guided(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None]:
        x0, share = predict(torch.cat([x, x]), torch.cat([at, at]), both)
        with_caption, without = x0.chunk(2)
        return without + guidance * (with_caption - without), None if share is None else share[: len(x)]

    return predict_guided
