"""Weighted k-means, exact where a point gets a centroid of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Progress = Callable[..., Iterable[int]]  # of items, what they are for, their unit, total: as log.progress
_CHUNK_VALUES = 1 << 24  # distances held at once


def silent(items: Iterable[int], what: str, unit: str, total: int) -> Iterable[int]:
    """Progress that is not shown."""
    return items


def kmeans(points: Tensor, weights: Tensor, k: int, iterations: int, seed: int, progress: Progress = silent) -> Tensor:
    """Centroids fp32 [k, D] of `points` fp32 [M, D], where point m stands for `weights`[m] > 0 equal points.

    k-means++ seeding (Arthur and Vassilvitskii 2007: each next centroid is a point, sampled with probability weight x
    squared distance to the nearest centroid so far), then Lloyd iterations. A centroid that loses all its points
    moves to the point with the largest weighted error. Costs M k D multiplications for the seeding and as many for
    each iteration.

    Raises:
        ValueError: fewer than k points: there is nothing to cluster.
    """
    if len(points) < k:
        raise ValueError(f"k-means: {len(points)} points are fewer than k = {k}")
    centroids = _seeds(points, weights, k, seed, progress)
    for _ in progress(range(iterations), "k-means", "iterations", total=iterations):
        nearest, error = assign(points, centroids)
        mass = torch.zeros(k).index_add_(0, nearest, weights)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points * weights[:, None])
        empty = mass == 0
        centroids = sums / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None]
        centroids[empty] = points[(error * weights).topk(int(empty.sum())).indices]
    return centroids


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid int64 [M] and squared distance fp32 [M] of each point [M, D]; ties go to the lower index."""
    half_squares = centroids.square().sum(dim=1) / 2
    nearest = []
    for chunk in torch.split(points, max(1, _CHUNK_VALUES // len(centroids))):
        nearest.append(torch.addmm(half_squares, chunk, centroids.T, beta=-1).argmax(dim=1))
    indices = torch.cat(nearest)
    return indices, (points - centroids[indices]).square().sum(dim=1)


def _seeds(points: Tensor, weights: Tensor, k: int, seed: int, progress: Progress) -> Tensor:
    """k of the points, all different, spread out by k-means++."""
    generator = torch.Generator().manual_seed(seed)
    centred = points - points.mean(dim=0)  # |p - q|^2 from products loses the fewest digits around the mean
    squares = centred.square().sum(dim=1)
    distance = torch.ones(len(points))  # the first is sampled by weight alone
    chosen: list[int] = []
    for _ in progress(range(k), "k-means++ seeding", "codes", total=k):
        # cumulative sum in fp64, so that the tail of many small probabilities stays reachable
        cumulative = (distance * weights).cumsum(0, dtype=torch.float64)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
        index = min(int(torch.searchsorted(cumulative, draw, right=True)), len(points) - 1)
        to_index = squares + squares[index] - 2 * (centred @ centred[index])
        distance = torch.minimum(distance, to_index.clamp_min_(0)) if chosen else to_index.clamp_min_(0)
        distance[index] = 0  # not sampled again
        chosen.append(index)
    return points[chosen]
