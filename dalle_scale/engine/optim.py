"""Optimizers: which parameter gets which rule, AdamW (of 16 bits: adam16.py), and Muon for matrices.

Roles: a parameter marked `is_embedding` (embeddings and heads to vocabularies) or with fewer than two dimensions
(gains, biases) is never decayed; every other parameter is a matrix and is. Each param group carries `base_lr`, its
learning rate at schedule factor 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.config import OptimConfig
from dalle_scale.engine.adam16 import AdamW16
from dalle_scale.engine.shared_memory import Room, room
from dalle_scale.nn.residual_scaling import branches_of

# Quintic whose iteration pulls every singular value in (0, 1] into about [0.7, 1.2] within five steps; the values of
# https://kellerjordan.github.io/posts/muon, which torch.optim.Muon uses too
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def build(net: nn.Module, config: OptimConfig, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer of one net, over its parameters that take a gradient. seed: of adamw16, see there."""
    groups = param_groups(net, config)
    if config.kind == "muon":
        return Muon(groups, betas=config.betas, eps=config.eps, momentum=config.muon_momentum)
    if config.kind == "adamw16":
        rules: dict[str, Any] = {name: getattr(config, name) for name in ("states", "rounding", "variance_clip")}
        return AdamW16(groups, lr=config.lr, betas=config.betas, eps=config.eps, seed=seed, **rules)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def param_groups(net: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Param groups by role: "plain" (never decayed), "matrix", "muon"; without empty ones.

    With adamw16 each residual branch has groups of its own, because its gradients have a scale of their own: "branch"
    is its number, -1 outside. Matrices come first: DeepSpeed takes the type of the first group for the engine's.
    """
    numbers: dict[nn.Parameter, int] = {}
    if config.kind == "adamw16":
        numbers = {p: number for number, (_, parameters) in enumerate(branches_of(net)) for p in parameters}
    members: dict[tuple[str, int], list[nn.Parameter]] = defaultdict(list)
    for parameter in net.parameters():
        if parameter.requires_grad:
            members[_role(parameter, config), numbers.get(parameter, -1)].append(parameter)
    groups = []
    order = ("matrix", "plain") if config.kind == "adamw16" else ("plain", "matrix", "muon")
    for role, branch in sorted(members, key=lambda key: (order.index(key[0]), key[1] < 0, key[1])):
        lr = config.muon_lr if role == "muon" else config.lr
        decay = 0.0 if role == "plain" else config.weight_decay
        keys = {"role": role, "branch": branch, "lr": lr, "base_lr": lr, "weight_decay": decay}
        groups.append({"params": members[role, branch], **keys})
    return groups


def _role(parameter: nn.Parameter, config: OptimConfig) -> str:
    if parameter.ndim < 2 or getattr(parameter, "is_embedding", False):
        return "plain"
    return "muon" if config.kind == "muon" and parameter.ndim == 2 else "matrix"


def set_lr(optimizer: Any, factor: float) -> None:
    """Set the learning rate of every group to its peak times `factor`. The only place that sets one."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class Muon(torch.optim.AdamW):
    """Momentum orthogonalised by Newton-Schulz for the groups of role "muon", AdamW for the others.

    The same step as torch.optim.Muon, which works in bf16 (about 100 times slower than fp32 on a CPU), one matrix
    at a time and identically on every rank. Here matrices of one shape share a batched product in fp32, each rank
    orthogonalises its part of them, and one collective distributes the result, so all ranks hold identical weights.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        for group in self.param_groups:  # now: what DeepSpeed puts in the place of 16-bit weights has no such mark
            group["transposed"] = [getattr(parameter, "is_transposed", False) for parameter in group["params"]]
        self.momentum = momentum
        self._room: Room | None = None  # for the orthogonalised matrices, where there are several ranks
        self._room_elements = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all groups from the gradients in `.grad`; consumes those of the matrices."""
        assert closure is None
        for group in self.param_groups:
            if group["role"] == "muon":
                self._step_matrices(group)
        super().step()  # the matrices have no gradient any more, and AdamW leaves such parameters alone

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Momentum, orthogonalisation, decoupled weight decay and step of one group of [out, in] matrices, or
        of [in, out] where marked as transposed."""
        chosen = [index for index, parameter in enumerate(group["params"]) if parameter.grad is not None]
        matrices = [group["params"][index] for index in chosen]
        gradients = [parameter.grad for parameter in matrices]
        if not matrices:
            return
        buffers = []
        for parameter in matrices:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                state["step"] = torch.zeros(())  # unused; AdamW reads back only states that have one
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        with self._directions(gradients, buffers) as directions:
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            for index, parameter, direction in zip(chosen, matrices, directions, strict=True):
                outputs, inputs = reversed(parameter.shape) if group["transposed"][index] else parameter.shape
                parameter.add_(direction, alpha=-group["lr"] * max(1.0, outputs / inputs) ** 0.5)
                parameter.grad = None

    @contextmanager
    def _directions(self, gradients: list[Tensor], momenta: list[Tensor]) -> Iterator[list[Tensor]]:
        """Orthogonalised Nesterov momentum of each matrix, to be read in the block; the ranks share the work."""
        dealt = deal([gradient.shape for gradient in gradients], dist.world_size())
        sizes = [[gradients[index].numel() for index in indices] for indices in dealt]
        mine, elements = dealt[dist.rank()], max(map(sum, sizes))
        directions = []
        if mine:
            lerp = torch._foreach_lerp([gradients[i] for i in mine], [momenta[i] for i in mine], self.momentum)
            directions = _orthogonalise_each(lerp)
        if len(dealt) == 1:
            yield directions
            return
        if self._room is None or elements > self._room_elements:
            self._room, self._room_elements = room(elements), elements
        own = self._room.mine(sum(sizes[dist.rank()])).split(sizes[dist.rank()])
        for part, direction in zip(own, directions, strict=True):
            part.view_as(direction).copy_(direction)
        with self._room.gathered(elements) as rows:
            found: dict[int, Tensor] = {}
            for row, indices, numels in zip(rows, dealt, sizes, strict=True):
                found |= dict(zip(indices, row[: sum(numels)].split(numels), strict=True))
            yield [found[index].view_as(gradient) for index, gradient in enumerate(gradients)]


def deal(shapes: Sequence[Sequence[int]], ranks: int) -> list[list[int]]:
    """Assign matrices to the ranks that orthogonalise them: the most work first, each to the rank that has the least so
    far."""
    work = [max(shape) * min(shape) ** 2 for shape in shapes]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda index: -work[index]):
        rank = sums.index(min(sums))
        dealt[rank].append(index)
        sums[rank] += work[index]
    return [sorted(indices) for indices in dealt]


def orthogonalise(batch: Tensor) -> Tensor:
    """Approximate U V^T of each matrix of `batch` [N, rows, columns], in fp32.

    Five quintic Newton-Schulz iterations: singular values end between about 0.7 and 1.2, which is all that Muon needs.
    """
    a, b, c = NEWTON_SCHULZ
    x = batch.float()
    wide = x.shape[1] <= x.shape[2]
    if not wide:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x if wide else x.mT


def _orthogonalise_each(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalise` for a list of 2-D tensors: those of one shape in one batch."""
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(index)
    found: dict[int, Tensor] = {}
    for indices in by_shape.values():
        found |= dict(zip(indices, orthogonalise(torch.stack([matrices[i] for i in indices])), strict=True))
    return [found[index] for index in range(len(matrices))]
