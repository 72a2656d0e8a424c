"""Distances of two sets of images by their features: FID, KID, Inception Score, precision and recall.

Features go in, numbers come out; what computes features is in features.py, what the numbers are of in fidelity.py. All
in float64: sums over tens of thousands of fp32 features lose the digits that a distance of a few units is made of.

Samples come from numpy's legacy generator, whose stream is frozen: in its published order (first set, then second,
subset by subset) it gives the numbers of torch-fidelity, digit by digit.

Moments are streamed, so that features of a data set need not be in memory, and the Fréchet distance of few samples
keeps the digits that torchmetrics and torch-fidelity lose (tests/nn/test_library_metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_ROWS = 1024  # of a matrix of distances that are in memory at once


class Moments:
    """Mean and covariance of vectors [N, D] that come a batch at a time (Chan et al. 1979): float64, whatever comes.

    Differences are taken from the mean of each batch, not from zero, so features far from zero lose nothing.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def add(self, features: Tensor) -> None:
        """Add a batch [B, D] on the CPU. The order of batches decides about the last bits."""
        if not len(features):
            return
        features = features.double()
        before, self.count = self.count, self.count + len(features)
        mean = features.mean(dim=0)
        centred, shift = features - mean, mean - self.mean
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(shift, shift) * (before * len(features) / self.count)
        self.mean += shift * (len(features) / self.count)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, float64 [D, D]; of two vectors or more."""
        assert self.count > 1, f"covariance of {self.count} vectors"
        return self._scatter / (self.count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (FID: Heusel et al., arXiv 1706.08500, Eq. 6).

        |m - m'|^2 + tr C + tr C' - 2 tr (C C')^(1/2)

    The last trace is the sum of the singular values of C^(1/2) C'^(1/2). Those come out with an error of 1e-16 of the
    largest; as square roots of the eigenvalues of a product the small ones would have 1e-8. So they have where a
    covariance is singular and the other is not: there the distance keeps seven digits.

    Args:
        mean, other_mean: float64 [D].
        covariance, other_covariance: float64 [D, D], symmetric, no negative eigenvalues.

    Returns:
        0 or more, but for rounding.
    """
    roots = _root(covariance) @ _root(other_covariance)
    shift = (mean - other_mean).square().sum()
    return float(shift + covariance.trace() + other_covariance.trace() - 2 * torch.linalg.svdvals(roots).sum())


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root [D, D]."""
    assert covariance.dtype == torch.float64
    values, vectors = torch.linalg.eigh(covariance)
    floor = 1e-12 * len(values) * float(values[-1].abs())
    assert float(values[0]) >= -floor, f"no covariance: it has the eigenvalue {float(values[0])}"
    # zero eigenvalues come out as rounding errors of either sign
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def kernel_distances(first: Tensor, second: Tensor, subset: int, subsets: int, seed: int) -> Iterator[float]:
    """Unbiased squared MMD of random subsets (KID: Binkowski et al., arXiv 1801.01401, Sec. 4), one after the other.

    Kernel (x.y / D + 1)^3. KID is their mean; it may fall below 0 where the sets are alike.

    Args:
        first, second: features [N, D] and [M, D] with N, M >= subset >= 2.
        subset: vectors of each set in a subset, without repetition.
        subsets: how many are sampled.
    """
    rng = np.random.RandomState(seed)
    for _ in range(subsets):
        x = first[torch.from_numpy(rng.choice(len(first), subset, replace=False))].double()
        y = second[torch.from_numpy(rng.choice(len(second), subset, replace=False))].double()
        within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
        yield float(within / (subset * (subset - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_scores(logits: Tensor, splits: int, seed: int) -> Tensor:
    """exp of the mean KL divergence of p(class | image) from p(class), of each of `splits` parts (Salimans et al.,
    arXiv 1606.03498, Sec. 4). The Inception Score is their mean.

    Args:
        logits: [N, C] with N >= splits; shuffled by `seed` before they are split.

    Returns:
        float64 [splits], each in 1 .. C.
    """
    logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))].double()
    bounds = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = logits[start:stop].log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0)
        # x log x of both: a class of probability 0 counts 0
        divergence = (p * log_p).sum(dim=1).mean() - torch.special.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    return torch.stack(scores)


def neighbour_radii(features: Tensor, k: int) -> Tensor:
    """Distance of each vector [N, D] to the k-th nearest of the others, float64 [N]; N > k."""
    features = features.double()
    # the nearest of all is the vector itself
    nearest = (torch.cdist(part, features).topk(k + 1, largest=False).values for part in torch.split(features, _ROWS))
    return torch.cat([distances[:, -1] for distances in nearest])


def covered_share(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of vectors [N, D] that lie in a ball: centres [M, D] with radii [M], from `neighbour_radii`.

    Of generated images in balls around real ones this is the precision, the other way round the recall (Kynkaanniemi
    et al., arXiv 1904.06991, Eq. 1 and 2).
    """
    centres = centres.double()
    inside = [(torch.cdist(part.double(), centres) <= radii).any(dim=1) for part in torch.split(features, _ROWS)]
    return float(torch.cat(inside).double().mean())
