"""One side of the comparison of dVAEs in autoencoders.py: "step" takes one training step.

The command line has a JSON object: side, shape (image_size, vocab, samples), model (fields of the net of that side),
optimizer ("adam" or, for ours, "engine") and, for ours, dtype ("fp32" or "bf16").
"""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side import quiet, serve
from torch import Tensor, nn

LEARNING_RATE = 1e-3  # of the peer's train_vae.py and of most of our recipes


def main() -> None:
    """Serve the side that the command line describes."""
    answers = quiet()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    asked = json.loads(sys.argv[1])
    shape = asked["shape"]
    size = (shape["samples"], shape["image_size"], shape["image_size"], 3)
    images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net, step = {"ours": ours, "dalle-pytorch": theirs}[asked["side"]](asked, images.permute(0, 3, 1, 2))
    serve(answers, net, {"step": step})


def ours(asked: dict[str, Any], images: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """The loss of the stage `dvae` on what its loader delivers: bytes, channels-last in memory.

    The optimizer is "adam", the peer's, or "engine", the one that the engine builds for a recipe. In bf16 the net's
    weights are rounded copies of those in fp32 that the optimizer works on, as DeepSpeed keeps them.
    """
    from dalle_scale.config import OptimConfig
    from dalle_scale.engine import optim
    from dalle_scale.nn.kept_memory import keep_memory
    from dalle_scale.stages import dvae

    keep_memory()  # as training does
    fields = {**asked["model"], "image_size": images.shape[-1], "vocab": asked["shape"]["vocab"], "augment": "none"}
    stage = dvae.Stage(dvae.Stage.Config.model_validate_json(json.dumps(fields)))
    masters = stage.nets()["model"]
    nets = {"model": copy.deepcopy(masters).bfloat16() if asked["dtype"] == "bf16" else masters}
    if asked["optimizer"] == "engine":
        optimizer = optim.build(masters, OptimConfig(lr=LEARNING_RATE, weight_decay=1e-4))
    else:
        optimizer = torch.optim.Adam(masters.parameters(), lr=LEARNING_RATE)
    pairs = [] if masters is nets["model"] else [*zip(masters.parameters(), nets["model"].parameters(), strict=True)]
    batch = {"image": images, "seed": torch.arange(len(images)), "weight": torch.ones(len(images))}
    number = 0

    def step() -> None:
        nonlocal number
        optimizer.zero_grad()
        stage.loss("model", nets, batch, number).total.backward()  # type: ignore[no-untyped-call]
        for master, weight in pairs:
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        for master, weight in pairs:
            weight.data.copy_(master)
        number += 1

    return nets["model"], step


def theirs(asked: dict[str, Any], images: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """DALLE-pytorch's DiscreteVAE with its defaults, on floats in 0..1 and with Adam, as in its train_vae.py."""
    declare_what_vqgan_needs()
    from dalle_pytorch import DiscreteVAE

    shape = asked["shape"]
    net = DiscreteVAE(image_size=shape["image_size"], num_tokens=shape["vocab"], **asked["model"])
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    values = images.contiguous().float() / 255

    def step() -> None:
        optimizer.zero_grad()
        net(values, return_loss=True).backward()
        optimizer.step()

    return net, step


def declare_what_vqgan_needs() -> None:
    """Empty names in place of what the package imports for its VQGAN alone, which needs a pytorch-lightning that is too
    old for this torch. DiscreteVAE reads none of them."""
    vqgan = {"taming": [], "taming.models": [], "taming.models.vqgan": ["VQModel", "GumbelVQ"]}
    for module, names in {"omegaconf": ["OmegaConf"], **vqgan}.items():
        sys.modules[module] = types.ModuleType(module)
        for name in names:
            setattr(sys.modules[module], name, None)


if __name__ == "__main__":
    main()
