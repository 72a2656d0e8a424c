"""Started by test_plan_bytes.py through the deepspeed launcher: what goes through torch's collectives in one step,
beside what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from support import checks
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.cluster import plan
from dalle_scale.config import RunConfig, parse
from dalle_scale.engine import build, ds_config
from dalle_scale.nn.residual_scaling import BranchScale

STEPS = 3  # at ZeRO 3 DeepSpeed looks on in the first ones
derive = ds_config.derive


class Net(nn.Module):
    """Matrices above and below the size that ZeRO 3 cuts, biases, an embedding; layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(400, 64)
        self.embedding.weight.is_embedding = True  # type: ignore[attr-defined]
        self.layers = nn.ModuleList(nn.Linear(64 if index == 0 else 128, 128) for index in range(4))
        self.out = nn.Linear(128, 200)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> [B, 200]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


class Mixed(Net):
    """Tells of its layers as residual branches, which makes their matrices 16 bits, and no others."""

    def branches(self) -> list[tuple[BranchScale, list[nn.Parameter]]]:
        return [(BranchScale(), list(layer.parameters())) for layer in self.layers]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.relu(nn.functional.linear(x.to(layer.weight.dtype), layer.weight).float() + layer.bias)
        return self.out(x)


def make(zero: int, dtype: str, micro: int, kind: str = "adamw", **engine: Any) -> RunConfig:
    tree = {"stage": "x", "run": "x", "steps": STEPS, "global_batch_size": 16, "data": {"train": "x"}}
    tree |= {"engine": {"zero": zero, "dtype": dtype, "micro_batch_size": micro, **engine}}
    return parse(RunConfig, {**tree, "optim": {"model": {"kind": kind, "lr": 0.01, "clip_norm": 1.0}}}, "test")


sent: list[float] = []  # by this rank, one entry a collective


def count_collectives() -> None:
    """Have them counted by ring, before DeepSpeed takes hold of them. The whole tensor is the largest argument."""

    def counted(name: str) -> Callable[..., Any]:
        plain = getattr(torch.distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
            ranks = torch.distributed.get_world_size(kwargs.get("group"))
            whole = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            sent.append((2 if name == "all_reduce" else 1) * (ranks - 1) / ranks * whole)
            return plain(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, counted(name))


def update(trained_nets: build.TrainedNets, config: RunConfig, step: int) -> None:
    micro = config.micro_batch_size(dist.world_size())
    with trained_nets.updating("model") as nets:
        for _ in range(config.accumulation(dist.world_size())):
            trained_nets["model"].backward(nets["model"](torch.arange(micro)).float().square().mean())
        trained_nets["model"].step(step)


def built(config: RunConfig, kind: type[nn.Module]) -> tuple[nn.Module, build.TrainedNets]:
    """A net without memory, for the plan, and engines around one with it."""
    nets = {"model": kind()}
    with torch.device("meta"):
        shapes = kind()
    build.share(nets)
    return shapes, build.build(config, nets)


def compare(config: RunConfig, kind: type[nn.Module] = Net) -> None:
    dist.use_shared_memory(None)  # what goes through it is not sent
    shapes, trained_nets = built(config, kind)
    for step in range(STEPS):
        sent.clear()
        update(trained_nets, config, step)
    world_size = dist.world_size()
    planned = plan.sent_bytes(plan.collective_bytes(config, shapes, "model", world_size), world_size)
    assert abs(sum(sent) / planned - 1) < 0.01, f"sent {sum(sent):.0f} bytes, planned {planned:.0f}"


def check_bytes(zero: int) -> None:
    compare(make(zero, "bf16", 8))
    compare(make(zero, "fp32", 4))
    if zero > 0:
        compare(make(zero, "bf16", 8, "adamw16"), Mixed)
    if zero == 3:
        with mock.patch.object(ds_config, "derive", without_reuse):
            compare(make(zero, "fp32", 4))


def check_bytes_between_nodes(zero: int) -> None:
    """Two machines of one rank each. Comes last: DeepSpeed keeps an mpu for all engines of a process."""
    for dtype, kind, net in (("fp32", "adamw", Net), ("bf16", "adamw16", Mixed)) if zero else ():
        for rank in (0, 3):
            config = make(zero, dtype, 8, kind, nodes=2, compression_rank=rank)
            shapes, trained_nets = built(config, net)
            for step in range(STEPS):
                update(trained_nets, config, step)
            counted = trained_nets.numbers()["between_nodes_mib"] * 2**20 / STEPS
            planned = plan.between_nodes_bytes(config, shapes, "model", 2)
            assert abs(counted / planned - 1) < 0.01, f"{dtype} {rank}: {counted:.0f} bytes, planned {planned:.0f}"


def without_reuse(config: RunConfig, net: str, world_size: int) -> dict[str, Any]:
    """No weight stays for the backward pass, as in a net of more than half a billion."""
    derived = derive(config, net, world_size)
    derived["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    return derived


if __name__ == "__main__":
    count_collectives()
    checks.run(globals())
