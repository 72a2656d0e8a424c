"""Started by test_shared_memory_ranks.py through the deepspeed launcher: collectives of `dist`, and means of gradients,
through shared memory and where there is none."""

from __future__ import annotations

from unittest import mock

import torch
from support import checks
from torch import nn

from dalle_scale import dist
from dalle_scale.engine import shared_memory
from dalle_scale.engine.nodes import GradientMeans
from dalle_scale.engine.optim import Muon, orthogonalise


def assert_collectives_are_right() -> None:
    ranks, rank = dist.world_size(), dist.rank()
    for op, want in (("sum", sum(range(ranks))), ("max", ranks - 1), ("mean", sum(range(ranks)) / ranks)):
        for count in (1, 3000):
            assert torch.equal(dist.all_reduce(torch.full((count,), float(rank)), op), torch.full((count,), want * 1.0))
    assert dist.sum_on_host([1.0, rank]) == [ranks, sum(range(ranks))]


def check_through_shared_memory(zero: int) -> None:
    assert isinstance(dist._shared_memory, shared_memory.SharedMemory)
    assert_collectives_are_right()


def check_without(zero: int) -> None:
    """As on two hosts: what rank 0 has made, another rank does not find; nor is there room, nor a known processor."""
    memory = dist._shared_memory
    part_bytes = 1000 if zero % 2 else 1 << 60
    folder = "/nowhere" if zero % 2 and dist.rank() == 0 else shared_memory._SHM
    with mock.patch.object(shared_memory, "_SHM", folder):
        assert shared_memory.share(dist.rank(), dist.world_size(), part_bytes) is None
    dist.use_shared_memory(None)
    assert_collectives_are_right()
    dist.use_shared_memory(memory)


def check_gradients(zero: int) -> None:
    assert isinstance(shared_memory.room(10), shared_memory.SharedMemory)
    assert_means_are_right()
    assert_rows_are_right()


def check_gradients_without(zero: int) -> None:
    """Through the process group."""
    memory = dist.shared_memory()
    dist.use_shared_memory(None)
    assert isinstance(shared_memory.room(10), shared_memory.GroupRoom)
    assert_means_are_right()
    assert_rows_are_right()
    dist.use_shared_memory(memory)


def assert_rows_are_right() -> None:
    """Of fewer elements than there is room for."""
    room = shared_memory.room(10)
    for net_name in range(3):
        room.mine(7 - net_name).fill_(dist.rank() + 10 * net_name)
        with room.gathered(7 - net_name) as rows:
            want = torch.arange(dist.world_size())[:, None].expand(-1, 7 - net_name) + 10.0 * net_name
            assert torch.equal(rows, want)


def assert_means_are_right() -> None:
    """Means of gradients of both types; of a parameter that the loss has reached on one rank alone, or on none."""
    net = nn.ModuleDict({"all": nn.Linear(3, 2), "one": nn.Linear(2, 2, dtype=torch.bfloat16), "none": nn.Linear(1, 1)})
    means = GradientMeans(net)
    for _ in range(2):
        net["all"].weight.grad = torch.full((2, 3), 1.0 + dist.rank())
        net["all"].bias.grad = None
        net["one"].weight.grad = torch.full((2, 2), 3.0, dtype=torch.bfloat16) if dist.rank() == 1 else None
        means.average()
        ranks = dist.world_size()
        assert torch.equal(net["all"].weight.grad, torch.full((2, 3), (ranks + 1) / 2))
        want = torch.full((2, 2), 3.0 / ranks).bfloat16()
        assert torch.equal(net["one"].weight.grad, want) and not net["none"].weight.grad.any()


def check_muon_room(zero: int) -> None:
    """More matrices have gradients from one step to the next: what the ranks orthogonalise for each other grows."""
    weights = [nn.Parameter(torch.zeros(4, 4 * count)) for count in (1, 2, 3)]
    muon = Muon([{"params": weights, "role": "muon", "lr": 1.0, "weight_decay": 0.0}], (0.9, 0.99), 1e-8, momentum=0.0)
    generator = torch.Generator().manual_seed(zero)
    for chosen in (weights[:1], weights[1:], weights):
        before = [weight.detach().clone() for weight in chosen]
        gradients = [torch.randn(weight.shape, generator=generator) for weight in chosen]
        for weight, gradient in zip(chosen, gradients, strict=True):
            weight.grad = gradient.clone()
        muon.step()
        for weight, old, gradient in zip(chosen, before, gradients, strict=True):
            torch.testing.assert_close(weight.detach(), old - orthogonalise(gradient[None])[0], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    checks.run(globals())
