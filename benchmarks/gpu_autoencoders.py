"""Training steps of the dVAE and of diffusion with bf16 products (autocast), beside peers.

The dVAE and its peer are those of autoencoders.py at 256 px, with as many parameters; the paper's own recipe stands
beside them. Diffusion is the paper's net for CIFAR-10, as in diffusion.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpu_clock
import gpu_sides
import torch
from autoencoders import DVAES
from diffusion import SIDES as DIFFUSION
from environment import ROOT

from dalle_scale import config as configs


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    dvae: dict[str, Any]  # as in autoencoders.DVAES
    diffusion: dict[str, dict[str, Any]]  # as diffusion.SIDES
    samples: int  # images of the dVAEs
    diffusion_samples: int
    repetitions: int  # steps
    recipe: bool  # whether the paper's dVAE is measured too
    install: bool = True  # peers that are not there


TOY_DVAE = {
    "shape": {"image_size": 16, "vocab": 16},
    "dalle-pytorch": {"num_layers": 2, "hidden_dim": 8, "codebook_dim": 8, "num_resnet_blocks": 1},
    "ours": {"downsampling": 4, "stem": "patch", "multipliers": [1], "n_hid": 8, "n_init": 8},
    "paper's stem": {"downsampling": 4, "multipliers": [1, 1, 1], "n_hid": 8, "n_init": 8},
}
TOY_NET = {"net": {"width": 32, "multipliers": [1, 1], "dropout": 0.0}, "blocks": 1, "attention_sizes": []}
FULL = Sizes(DVAES["256 px, 32x32 of 8192 codes"], DIFFUSION, 16, 128, repetitions=10, recipe=True)
TOY_DIFFUSION = {name: {**DIFFUSION[name], **TOY_NET} for name in ("diffusers", "denoising-diffusion-pytorch", "ours")}
TOY = Sizes(TOY_DVAE, TOY_DIFFUSION, 2, 2, 2, recipe=False)


def measure(sizes: Sizes, device: torch.device, report: gpu_clock.Report) -> None:
    """Both, and write."""
    result: dict[str, Any] = {"matrix_rate": gpu_clock.matrix_rate(device)}
    how = (sizes.repetitions, sizes.install, device)
    result["dvae"] = {
        "samples": sizes.samples,
        **sizes.dvae["shape"],
        "sides": gpu_sides.compare(dvaes(sizes), sizes.samples, "images", *how),
    }
    report.write(result, last=False)
    steps = {"kind": "diffusion", "sizes": {}, "samples": sizes.diffusion_samples, "steps": 1}
    asked = {name: {**steps, **side} for name, side in sizes.diffusion.items()}
    result["diffusion"] = {
        "samples": sizes.diffusion_samples,
        "sides": gpu_sides.compare(asked, sizes.diffusion_samples, "images", *how),
    }
    report.write(result)


def dvaes(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Sides by name, as gpu_side.py asks for them."""
    shape = {**sizes.dvae["shape"], "samples": sizes.samples}
    common = {"kind": "dvae", "sizes": {}, "shape": shape, "optimizer": "adam", "dtype": "fp32"}
    rows = {name: {**common, "side": "ours", "model": sizes.dvae[name]} for name in ("ours", "paper's stem")}
    rows["dalle-pytorch"] = {**common, "side": "dalle-pytorch", "model": sizes.dvae["dalle-pytorch"]}
    if sizes.recipe:
        recipe = configs.load(ROOT / "configs" / "dvae" / "paper_256.yaml").model
        model = {key: value for key, value in recipe.items() if key not in ("image_size", "vocab", "augment")}
        rows["ours, dvae/paper_256"] = {**common, "side": "ours", "model": model, "optimizer": "engine"}
    return rows
