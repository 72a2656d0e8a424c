"""The samplers beside the schedulers of diffusers, step by step and from noise to images.

In float64 where theirs allow it: their alphas_cumprod is replaced by the same one in double precision.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from dalle_scale.models.diffusion.samplers import Options, follow, plan, sample, times
from dalle_scale.nn.counter_rng import normal_noise

LINEAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
SHAPE = (3, 4, 4)
SEEDS = torch.tensor([3, 14, 15])


def eps(x: Tensor, at: Tensor) -> Tensor:
    """Noise that an arbitrary model predicts, [B, 3, 4, 4]."""
    return torch.sin(2 * x + at.view(-1, 1, 1, 1) / 100) + 0.5 * x.roll(1, dims=1)


def predict(x: Tensor, at: Tensor) -> tuple[Tensor, None]:
    a = LINEAR[at].view(-1, 1, 1, 1).to(x.dtype)
    return (x - (1 - a).sqrt() * eps(x, at)) / a.sqrt(), None


def double(scheduler):
    scheduler.alphas_cumprod = LINEAR
    return scheduler


def start() -> Tensor:
    return normal_noise(SEEDS, 1000, 48).view(-1, *SHAPE).double()


@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ancestral_steps(variance, spacing):
    """Every step of a chain from the same x with the same noise, x0 clipped."""
    name = {"learned": "learned_range"}.get(variance, variance)
    theirs = double(DDPMScheduler(variance_type=name, clip_sample=True))
    theirs.set_timesteps(timesteps=times(LINEAR, 50, spacing)[::-1])
    x = start()
    steps = plan(LINEAR, Options(steps=50, spacing=spacing, variance=variance), learned=variance == "learned")
    assert [step.time for step in steps] == theirs.timesteps.tolist()
    for step in steps:
        at = torch.full((len(x),), step.time)
        output = eps(x, at)
        share = torch.sigmoid(x)
        if variance == "learned":
            output = torch.cat([output, 2 * share - 1], dim=1)  # they take -1 .. 1
        expected = theirs.step(output, step.time, x, torch.Generator().manual_seed(step.time)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step.time), dtype=torch.float64)
        found = step.keep * x + step.data * predict(x, at)[0].clamp(-1, 1)
        if step.log_variances is not None:
            small, large = step.log_variances
            found = found + torch.exp((small + share * (large - small)) / 2) * noise
        else:
            found = found + step.std * noise
        if step.time:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        x = expected


@pytest.mark.parametrize(
    ("steps", "eta", "clip"), [(10, 0.0, False), (50, 0.4, False), (100, 1.0, True), (20, 0.0, True)]
)
def test_ddim_from_noise_to_images(steps, eta, clip):
    """Numbers of steps that divide T: their step always goes to t - T // steps. Their clipped x0 takes its own noise
    only when asked to."""
    theirs = double(DDIMScheduler(clip_sample=clip, set_alpha_to_one=True))
    theirs.set_timesteps(steps)
    x = start()
    for time in theirs.timesteps:
        noise = normal_noise(SEEDS, int(time), 48).view(-1, *SHAPE).double()
        output = eps(x, time.expand(len(x)))
        step = theirs.step(output, int(time), x, eta, use_clipped_model_output=clip, variance_noise=noise)
        x = step.prev_sample
    options = Options(method="ddim", steps=steps, eta=eta, clip=clip)
    found = follow(predict, plan(LINEAR, options), start(), clip, SEEDS)
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(sample(predict, LINEAR, SEEDS, SHAPE, options).double(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("steps", "spacing"), [(10, "uniform"), (20, "log_snr"), (25, "quadratic")])
def test_dpm_solver_from_noise_to_images(steps, spacing):
    """They keep their noise levels in single precision."""
    theirs = double(DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", final_sigmas_type="zero"))
    theirs.set_timesteps(timesteps=times(LINEAR, steps, spacing)[::-1])
    x = start()
    for time in theirs.timesteps:
        x = theirs.step(eps(x, time.expand(len(x))), time, x).prev_sample
    found = follow(predict, plan(LINEAR, Options(method="dpm++", steps=steps, spacing=spacing)), start(), clip=False)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
