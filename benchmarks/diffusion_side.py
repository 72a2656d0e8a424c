"""One side of diffusion.py: "step" takes one training step, "sample" samples images by a few steps of DDIM.

The command line has a JSON object: side, samples, steps (of DDIM), net (channels at full size, their multipliers,
dropout) and, for ours, blocks (residual blocks at each side), attention_sizes and optimizer ("adam" or "engine").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side import quiet, serve
from torch import Tensor, nn

SIZE, TIMESTEPS, LEARNING_RATE = 32, 1000, 2e-4
Actions = dict[str, Callable[[], Any]]


def main() -> None:
    """Serve the side that the command line describes."""
    answers = quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    from dalle_scale.nn.torchvision_compat import declare_missing_operators

    declare_missing_operators()  # the peers import torchvision
    asked = json.loads(sys.argv[1])
    size = (asked["samples"], SIZE, SIZE, 3)
    images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    sides = {"ours": ours, "diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion_pytorch}
    serve(answers, *sides[asked["side"]](asked, images.permute(0, 3, 1, 2)))


def trained(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(asked: dict[str, Any], images: Tensor) -> tuple[nn.Module, Actions]:
    """The stage `ddpm`, on what its loader delivers: bytes, channels-last in memory."""
    from dalle_scale.config import OptimConfig
    from dalle_scale.engine import optim
    from dalle_scale.models.diffusion.samplers import Options
    from dalle_scale.stages import ddpm

    fields = {"blocks": asked["blocks"], "attention_sizes": asked["attention_sizes"], **asked["net"]}
    stage = ddpm.Stage(ddpm.Stage.Config.model_validate_json(json.dumps({**fields, "image_size": SIZE})))
    nets = stage.nets()
    if asked["optimizer"] == "engine":
        optimizer = optim.build(nets["model"], OptimConfig(lr=LEARNING_RATE, weight_decay=0.0))
    else:
        optimizer = torch.optim.Adam(nets["model"].parameters(), lr=LEARNING_RATE)
    seeds = torch.arange(len(images))
    batch = {"image": images, "seed": seeds, "weight": torch.ones(len(images))}
    steps = iter(range(1_000_000))

    def draw() -> None:
        nets["model"].eval()
        stage.sample_images(nets, seeds, options=Options(method="ddim", steps=asked["steps"]))
        nets["model"].train()

    step = trained(lambda: stage.loss("model", nets, batch, next(steps)).total, optimizer)
    return nets["model"], {"step": step, "sample": draw}


def diffusers(asked: dict[str, Any], images: Tensor) -> tuple[nn.Module, Actions]:
    """UNet2DModel in the shape of google/ddpm-cifar10-32, with its schedulers, as in diffusers' own example."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    net, widths = asked["net"], [asked["net"]["width"] * multiplier for multiplier in asked["net"]["multipliers"]]
    attends = [SIZE >> level in asked["attention_sizes"] for level in range(len(widths))]
    model = UNet2DModel(
        sample_size=SIZE,
        layers_per_block=asked["blocks"],
        block_out_channels=tuple(widths),
        down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        attention_head_dim=None,  # one head
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        dropout=net["dropout"],
    )
    values = images.contiguous().float() / 127.5 - 1
    noising, decoding = DDPMScheduler(TIMESTEPS), DDIMScheduler(TIMESTEPS)

    def loss() -> Tensor:
        noise, times = torch.randn_like(values), torch.randint(TIMESTEPS, (len(values),))
        found: Tensor = model(noising.add_noise(values, noise, times), times).sample
        return nn.functional.mse_loss(found, noise)

    @torch.no_grad()
    def draw() -> None:
        model.eval()
        decoding.set_timesteps(asked["steps"])
        x = torch.randn_like(values)
        for time in decoding.timesteps:
            x = decoding.step(model(x, time).sample, time, x).prev_sample
        model.train()

    return model, {"step": trained(loss, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)), "sample": draw}


def denoising_diffusion_pytorch(asked: dict[str, Any], images: Tensor) -> tuple[nn.Module, Actions]:
    """Its Unet and GaussianDiffusion; two blocks a side, linear attention where ours has none."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = asked["net"]
    model = Unet(net["width"], dim_mults=tuple(net["multipliers"]), dropout=net["dropout"], flash_attn=True)
    diffusion = GaussianDiffusion(
        model, image_size=SIZE, timesteps=TIMESTEPS, sampling_timesteps=asked["steps"], objective="pred_noise"
    )
    values = images.contiguous().float() / 255

    def draw() -> None:
        diffusion.eval()
        diffusion.sample(batch_size=len(values))
        diffusion.train()

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE)
    return model, {"step": trained(lambda: diffusion(values), optimizer), "sample": draw}


if __name__ == "__main__":
    main()
