"""The memory estimate: against what plain PyTorch allocates, and against the formulas of ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.autoencoder import Net

from dalle_scale.config import RunConfig, parse
from dalle_scale.engine import memory, optim
from dalle_scale.models.transformer.model import Transformer


def make(kind: str = "adamw", ema_decay: float = 0.9, **engine: Any) -> RunConfig:
    section = {"lr": 0.1, "kind": kind, "ema_decay": ema_decay}
    tree = {"stage": "toy", "run": "x", "steps": 1, "global_batch_size": 8, "data": {"train": "x"}}
    return parse(RunConfig, {**tree, "engine": {"dtype": "fp32", **engine}, "optim": {"model": section}}, "test")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_equals_what_torch_allocates_at_zero_0(kind: str) -> None:
    net = Net(8, 16)
    optimizer = optim.build(net, make(kind).optim["model"])
    net(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).sum().backward()
    gradients = sum(4 * parameter.grad.numel() for parameter in net.parameters() if parameter.grad is not None)
    optimizer.step()
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    sizes = memory.estimate(net, make(kind), "model", world_size=2)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert sizes == {
        "weights": 4 * parameters,
        "master weights": 0,
        "gradients": gradients,
        "optimizer": sum(4 * state.numel() for state in states),
        "average": 4 * parameters,
        "buffers": 4 + 8,
    }


@pytest.mark.parametrize(
    ("engine", "weights", "masters", "gradients", "optimizer"),
    [
        ({"zero": 1}, 4, 1, 4, 2),
        ({"zero": 2}, 4, 1, 1, 2),
        ({"zero": 3}, 1, 1, 1, 2),
        ({"zero": 0, "dtype": "bf16"}, 2, 4, 2, 8),
        ({"zero": 2, "dtype": "bf16"}, 2, 1, 0.5, 2),
        ({"zero": 3, "dtype": "bf16", "kind": "adamw16"}, 0.5, 0, 0.5, 1),
        ({"zero": 1, "dtype": "fp16", "kind": "adamw16"}, 2, 0, 2, 1),
    ],
)
def test_bytes_a_parameter_on_four_ranks(
    engine: dict[str, Any], weights: float, masters: float, gradients: float, optimizer: float
) -> None:
    """arXiv 1910.02054, Fig. 1, with fp32 working weights where the dtype says so."""
    net = torch.nn.Linear(999, 1000, device="meta")  # a million parameters without memory
    sizes = memory.estimate(net, make(**{"ema_decay": 0.0, **engine}), "model", world_size=4)
    want = {"weights": weights, "master weights": masters, "gradients": gradients, "optimizer": optimizer}
    assert sizes == {**{kind: 1e6 * size for kind, size in want.items()}, "average": 0, "buffers": 0}


def test_matrices_alone_are_16_bits_in_a_net_of_branches() -> None:
    sizes = {"text_vocab": 11, "text_length": 5, "image_vocab": 13, "grid": 3, "width": 32, "heads": 2}
    with torch.device("meta"):
        net = Transformer(**sizes, kinds=("row", "column", "conv"))
    matrices, parameters = 3 * 12 * 32**2, sum(p.numel() for p in net.parameters())
    rest = parameters - matrices
    config = make("adamw16", ema_decay=0.0, zero=1, dtype="fp16")
    got = memory.estimate(net, config, "model", world_size=1)
    want = {"weights": 2 * matrices + 4 * rest, "gradients": 2 * matrices + 4 * rest, "master weights": 0}
    assert got == {**want, "optimizer": 4 * matrices + 8 * rest, "average": 0, "buffers": 0}


def test_report_tells_everything() -> None:
    config = make(zero=2)
    text = memory.report(config, {"model": torch.nn.Linear(999, 1000, device="meta")}, 2.5e6, world_size=4)
    assert "zero: 2" in text and "2.500e+06 a sample, 2.000e+07 a step" in text
    assert "1,000,000 parameters" in text and "each of 4 ranks at ZeRO 2" in text
