"""Param groups by role, and Muon against torch.optim.Muon and against singular value decompositions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.autoencoder import Net
from torch import nn

from dalle_scale.config import OptimConfig
from dalle_scale.engine import optim
from dalle_scale.nn.linear import TransposedLinear


def config(**settings: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 0.01, "weight_decay": 0.1, **settings})


def names_by_role(net: nn.Module, settings: OptimConfig) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = optim.param_groups(net, settings)
    return {group["role"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


PLAIN = {"conv.bias", "norm.weight", "norm.bias", "mix.bias", "levels.weight", "up.bias"}
MATRICES = {"down.weight", "mix.weight", "up.weight"}


def test_roles() -> None:
    net = Net(8, 16)
    assert names_by_role(net, config()) == {"plain": PLAIN, "matrix": MATRICES | {"conv.weight"}}
    want = {"plain": PLAIN, "matrix": {"conv.weight"}, "muon": MATRICES}
    assert names_by_role(net, config(kind="muon")) == want
    net.conv.requires_grad_(False)
    assert names_by_role(net, config(kind="muon")) == {"plain": PLAIN - {"conv.bias"}, "muon": MATRICES}


def test_learning_rate_and_decay_of_each_role() -> None:
    groups = {g["role"]: g for g in optim.param_groups(Net(8, 16), config(kind="muon", muon_lr=0.02))}
    assert {role: (group["base_lr"], group["weight_decay"]) for role, group in groups.items()} == {
        "plain": (0.01, 0.0),
        "matrix": (0.01, 0.1),
        "muon": (0.02, 0.1),
    }
    optimizer = optim.build(Net(8, 16), config(kind="muon", muon_lr=0.02))
    optim.set_lr(optimizer, 0.5)
    optim.set_lr(optimizer, 0.25)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.0025, 0.0025, 0.005])


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    net, evaluation_copy = nn.Linear(5, 3), nn.Linear(5, 3)
    evaluation_copy.load_state_dict(net.state_dict())
    ours = optim.build(net, config(betas=(0.8, 0.9), eps=1e-6))
    groups = [
        {"params": [evaluation_copy.weight], "weight_decay": 0.1},
        {"params": [evaluation_copy.bias], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        for module, optimizer in ((net, ours), (evaluation_copy, theirs)):
            optimizer.zero_grad()
            module(torch.linspace(-1, 1, 5) + step).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(net.weight, evaluation_copy.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net.bias, evaluation_copy.bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4), (1, 5), (5, 1)])
def test_orthogonalise_has_the_singular_vectors_of_its_input(shape: tuple[int, int]) -> None:
    """Singular values land in [0.68, 1.21], the range of this polynomial; the vectors do not turn."""
    torch.manual_seed(1)
    matrices = torch.randn(3, *shape)
    for matrix, result in zip(matrices, optim.orthogonalise(matrices), strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        core = u.T @ result @ v.T
        diagonal = core.diagonal()
        assert ((diagonal > 0.68) & (diagonal < 1.21)).all()
        torch.testing.assert_close(core, torch.diag(diagonal), rtol=0, atol=2e-5)


def test_orthogonalise_is_exact_where_the_polynomial_is_known() -> None:
    """A scaled rotation has equal singular values, so the iteration is that of a number."""
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    value = 1 / 2**0.5  # after the division by the Frobenius norm
    a, b, c = optim.NEWTON_SCHULZ
    for _ in range(optim.NEWTON_SCHULZ_STEPS):
        value = a * value + b * value**3 + c * value**5
    torch.testing.assert_close(optim.orthogonalise(7 * rotation[None])[0], value * rotation, rtol=1e-5, atol=1e-6)


def test_orthogonalise_of_nothing_is_nothing() -> None:
    assert torch.equal(optim.orthogonalise(torch.zeros(1, 3, 2)), torch.zeros(1, 3, 2))


def test_muon_is_torchs() -> None:
    """torch.optim.Muon iterates in bf16, which keeps 8 bits: the steps agree to a few per cent, their directions to
    one in a thousand. Momentum, decay and learning rates of both are the same numbers."""
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8)]
    torch.manual_seed(2)
    start = [torch.randn(shape) * 0.1 for shape in shapes]
    ours, theirs = nn.ParameterList(map(torch.clone, start)), nn.ParameterList(map(torch.clone, start))
    settings = config(kind="muon", muon_lr=0.02, muon_momentum=0.9)
    mine = optim.build(ours, settings)
    reference = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(4):
        for index, shape in enumerate(shapes):
            gradient = torch.randn(shape)
            ours[index].grad, theirs[index].grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    for index, first in enumerate(start):
        moved, want = (ours[index] - first).detach().flatten(), (theirs[index] - first).detach().flatten()
        assert torch.cosine_similarity(moved, want, dim=0) > 0.999
        torch.testing.assert_close(moved.norm(), want.norm(), rtol=0.02, atol=0)


def test_muon_of_a_transposed_matrix_is_that_of_the_matrix() -> None:
    """A transposed matrix of four times as many inputs as outputs moves as the matrix would, not twice as far."""
    torch.manual_seed(5)
    linear, transposed = nn.Linear(16, 4), TransposedLinear(16, 4)
    with torch.no_grad():
        transposed.weight_t.copy_(linear.weight.t())
        transposed.bias.copy_(linear.bias)
    optimizers = [optim.build(net, config(kind="muon")) for net in (linear, transposed)]
    x = torch.randn(8, 16)
    for _ in range(3):
        for net, optimizer in zip((linear, transposed), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(transposed.weight, linear.weight)


def test_muon_treats_the_rest_as_adamw() -> None:
    torch.manual_seed(3)
    net, evaluation_copy = Net(8, 16), Net(8, 16)
    evaluation_copy.load_state_dict(net.state_dict())
    muon, adamw = optim.build(net, config(kind="muon")), optim.build(evaluation_copy, config())
    for step in range(3):
        for index, (mine, theirs) in enumerate(zip(net.parameters(), evaluation_copy.parameters(), strict=True)):
            generator = torch.Generator().manual_seed(100 * step + index)
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        muon.step()
        adamw.step()
    for name, theirs in evaluation_copy.named_parameters():
        assert torch.equal(net.get_parameter(name), theirs) == (name not in MATRICES), name


def test_muon_state_comes_back() -> None:
    torch.manual_seed(4)
    nets = [Net(8, 16) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (optim.build(net, config(kind="muon")) for net in nets)

    def step(net: Net, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    step(nets[0], first, 0)
    nets[1].load_state_dict(nets[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for net, optimizer in zip(nets, (first, second), strict=True):
        step(net, optimizer, 1)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(mine, theirs)
