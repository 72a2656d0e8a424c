"""Gradients between nodes as products of thin matrices: PowerSGD (arXiv 1905.13727; 2102.12092, App. E.2).

A matrix M [m, n] of gradients, m <= n, travels as P = M Q [m, r] and, with P made orthonormal, as M^T P [n, r]: every
replica then holds the same P (M^T P)^T. What that leaves out stays behind on each replica and is added to its next
gradient (error feedback). Q is Gaussian and fixed for the whole run; sampling it anew each time costs much accuracy
(App. E.2, footnote 10).

Means instead of the paper's sums: an error is of the mean gradient, so errors are averaged, not added, where the
number of nodes changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REGULARISATION = 1e-6  # added to the diagonal of P: a gradient of low rank keeps independent columns

AllReduce = Callable[[list[Tensor]], None]  # replaces tensors by their means over the replicas


def pays(rows: int, columns: int, rank: int) -> bool:
    """Whether the two factors are smaller than the matrix."""
    return rank * (rows + columns) < rows * columns


def orthonormal(matrix: Tensor) -> Tensor:
    """Columns of a basis [m, r] by Householder reflections; Gram-Schmidt loses digits where columns are alike."""
    basis: Tensor = torch.linalg.qr(matrix + REGULARISATION * torch.eye(*matrix.shape, device=matrix.device))[0]
    return basis


def _averaged(factors: list[Tensor], matrices: Sequence[Tensor], all_reduce: AllReduce) -> list[Tensor]:
    """Means of fp32 factors, which travel in as many bits as the matrices; what that rounds off stays in the errors.

    The paper sends 1-6-9 by an all-reduce of its own; bf16, which every backend adds up, reaches as far.
    """
    wires = [torch.bfloat16 if matrix.dtype.itemsize == 2 else torch.float32 for matrix in matrices]
    sent = [factor.to(wire) for factor, wire in zip(factors, wires, strict=True)]
    all_reduce(sent)
    return [factor.float() for factor in sent]


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """bool []; True of no tensors."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all() if tensors else torch.tensor(True)


class PowerSGD:
    """The errors and the Q of one rank's matrices, which are the same ones in the same order in every step."""

    def __init__(self, rank: int, seed: int) -> None:
        """seed: equal on all replicas; ranks that hold other shards may have another."""
        self.rank, self._seed = rank, seed
        self._sketches: list[Tensor] = []  # Q [n, r]
        self.errors: list[Tensor] = []  # [m, n], fp32

    @torch.no_grad()
    def average(
        self,
        matrices: Sequence[Tensor],
        scales: Sequence[float],
        all_reduce: AllReduce,
        finite: Callable[[Tensor], Tensor],
    ) -> None:
        """Replace gradients by their compressed means. Collective among replicas.

        Where something is not finite on any rank, no gradient is, on all ranks, so that all skip the step; errors
        keep what they were, because what the step would have carried must not be lost. Where gradients are finite and
        their factors are not, errors keep the gradients too (App. E.2).

        Gradients are added to the errors in place: a copy of all sums would take as much memory as the errors.

        Args:
            matrices: [m, n] each, m <= n, any float type; of a rank that has none, an empty list.
            scales: what each was multiplied by, and its mean will be. Errors are of gradients without scale, because it
                changes from step to step.
            all_reduce: see there.
            finite: bool [] on this rank -> whether it holds on all ranks of the job.
        """
        if not self._sketches:
            self._start(matrices)
        if not finite(_all_finite(matrices)):
            for matrix in matrices:
                matrix.fill_(torch.nan)
            return
        for error, matrix, scale in zip(self.errors, matrices, scales, strict=True):
            error.add_(matrix, alpha=1 / scale)
        left = [error @ sketch for error, sketch in zip(self.errors, self._sketches, strict=True)]
        left = _averaged(left, matrices, all_reduce)
        bases = [orthonormal(factor) for factor in left]
        right = [error.T @ basis for error, basis in zip(self.errors, bases, strict=True)]
        right = _averaged(right, matrices, all_reduce)
        fine = finite(_all_finite([*left, *right]))
        for matrix, scale, error, p, q in zip(matrices, scales, self.errors, bases, right, strict=True):
            mean = p @ q.T
            error.sub_(torch.where(fine, mean, torch.zeros_like(mean)))
            matrix.copy_(torch.where(fine, mean * scale, torch.full_like(mean, torch.nan)))

    def _start(self, matrices: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        for matrix in matrices:
            sketch = torch.randn(matrix.shape[1], self.rank, generator=generator)
            self._sketches.append(sketch.to(matrix.device))
        if not self.errors:  # none that a checkpoint held
            self.errors = [torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) for matrix in matrices]
