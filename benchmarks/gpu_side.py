"""One side of a comparison on a GPU, in a process of its own: its memory is known, and a peer's packages stay apart.

The nets, losses and optimizers are those of transformer_side.py, dvae_side.py and diffusion_side.py; products are of
bf16 on all sides (autocast over fp32 weights). The command line has a JSON object: device, kind ("transformer", "dvae"
or "diffusion"), sizes (constants of that file to replace), and what that file asks for.

Reads lines and answers each in JSON: "parameters"; "step" with the seconds of a training step, until the device has
done it; "memory" with the most bytes of tensors so far, null on CPUs. What goes wrong is answered as {"error": ...}.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from side import quiet, timed
from torch import nn

Side = tuple[nn.Module, Callable[[], None]]  # a net and one training step of it


def main() -> None:
    """Serve the side that the command line describes."""
    answers = quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    asked = json.loads(sys.argv[1])
    device = torch.device(asked["device"])

    @cache
    def side() -> Side:
        torch.manual_seed(0)
        return KINDS[asked["kind"]](asked, device)

    def step() -> None:
        side()[1]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    actions: dict[str, Callable[[], Any]] = {
        "parameters": lambda: sum(parameter.numel() for parameter in side()[0].parameters()),
        "step": lambda: timed(step)[0],
        "memory": lambda: torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    for line in sys.stdin:
        try:
            answer = actions[line.strip()]()
        except Exception as error:  # of a peer, whatever it is: its row will say so
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def opened(name: str, asked: dict[str, Any]) -> Any:
    """A module of this folder with the sizes that were asked for in place of its own."""
    module = importlib.import_module(name)
    vars(module).update(asked["sizes"])
    return module


def transformer(asked: dict[str, Any], device: torch.device) -> Side:
    """asked: side, attention (kinds of the layers), samples."""
    sides = opened("transformer_side", asked)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, sides.WORDS, (asked["samples"], sides.TEXT), generator=generator).to(device)
    codes = torch.randint(sides.CODES, (asked["samples"], sides.GRID**2), generator=generator).to(device)
    make = {"ours": sides.ours, "dalle-pytorch": sides.dalle_pytorch, "gpt2": sides.gpt2}[asked["side"]]
    with device:
        net, loss = make(asked, text, codes)
    optimizer = torch.optim.AdamW(net.to(device).parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            total = loss()
        total.backward()
        optimizer.step()

    return net, step


def dvae(asked: dict[str, Any], device: torch.device) -> Side:
    """asked: as dvae_side.py."""
    sides = opened("dvae_side", asked)
    make = {"ours": sides.ours, "dalle-pytorch": sides.theirs}[asked["side"]]
    with device:
        net, step = make(asked, images(asked["shape"]["samples"], asked["shape"]["image_size"], device))
    return net, in_bf16(step, device)


def diffusion(asked: dict[str, Any], device: torch.device) -> Side:
    """asked: as diffusion_side.py."""
    from dalle_scale.nn.torchvision_compat import declare_missing_operators

    declare_missing_operators()  # the peers import torchvision
    sides = opened("diffusion_side", asked)
    make = {
        "ours": sides.ours,
        "diffusers": sides.diffusers,
        "denoising-diffusion-pytorch": sides.denoising_diffusion_pytorch,
    }[asked["side"]]
    with device:
        net, actions = make(asked, images(asked["samples"], sides.SIZE, device))
    return net.to(device), in_bf16(actions["step"], device)


def images(samples: int, size: int, device: torch.device) -> torch.Tensor:
    """Random bytes [samples, 3, size, size], channels-last in memory."""
    shape, generator = (samples, size, size, 3), torch.Generator().manual_seed(0)
    sampled = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device="cpu")
    return sampled.permute(0, 3, 1, 2).to(device)


def in_bf16(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step that computes its loss, gradients and step itself; what it makes without naming a device lies here."""

    def wrapped() -> None:
        with device, torch.autocast(device.type, torch.bfloat16):
            step()

    return wrapped


KINDS: dict[str, Callable[[dict[str, Any], torch.device], Side]] = {
    "transformer": transformer,
    "dvae": dvae,
    "diffusion": diffusion,
}


if __name__ == "__main__":
    main()
