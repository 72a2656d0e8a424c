"""k-means against brute force on sets small enough for it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dalle_scale.nn.kmeans import assign, kmeans


def inertia(points: Tensor, weights: Tensor, centroids: Tensor) -> float:
    return float(((points[:, None] - centroids).square().sum(dim=2).amin(dim=1) * weights).sum())


def test_assign_is_brute_force() -> None:
    torch.manual_seed(0)
    points, centroids = torch.rand(200, 5), torch.rand(17, 5)
    distances = (points[:, None] - centroids).square().sum(dim=2)
    nearest, error = assign(points, centroids)
    assert torch.equal(nearest, distances.argmin(dim=1))
    torch.testing.assert_close(error, distances.amin(dim=1))


def test_finds_the_best_partition_of_separated_clusters() -> None:
    torch.manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    points = (centres[:, None] + 0.3 * torch.randn(3, 3, 2)).flatten(0, 1)
    weights = torch.randint(1, 5, (9,)).float()
    best = float("inf")
    for labels in product(range(3), repeat=9):
        one_hot = torch.nn.functional.one_hot(torch.tensor(labels), 3).float() * weights[:, None]
        if (one_hot.sum(dim=0) > 0).all():
            best = min(best, inertia(points, weights, one_hot.T @ points / one_hot.sum(dim=0)[:, None]))
    found = kmeans(points, weights, 3, iterations=10, seed=0)
    assert inertia(points, weights, found) == pytest.approx(best, rel=1e-4)


def test_weights_stand_for_repeated_points() -> None:
    torch.manual_seed(2)
    points, repeats = torch.rand(50, 3), torch.randint(1, 4, (50,))
    weighted = kmeans(points, repeats.float(), 4, iterations=50, seed=0)
    # a fixed point of Lloyd's iteration over the repeated points
    repeated = points.repeat_interleave(repeats, dim=0)
    nearest, _ = assign(repeated, weighted)
    means = torch.stack([repeated[nearest == code].mean(dim=0) for code in range(4)])
    torch.testing.assert_close(weighted, means, rtol=1e-4, atol=1e-5)


def test_iterations_lower_the_error_and_leave_no_centroid_empty() -> None:
    torch.manual_seed(3)
    points, weights = torch.rand(500, 4), torch.ones(500)
    errors = [inertia(points, weights, kmeans(points, weights, 40, iterations, seed=0)) for iterations in (0, 1, 10)]
    assert errors[0] > errors[1] > errors[2]
    nearest, _ = assign(points, kmeans(points, weights, 40, 10, seed=0))
    assert len(nearest.unique()) == 40


def test_k_points_are_their_own_centroids() -> None:
    points = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    found = kmeans(points, torch.rand(12) + 0.1, 12, iterations=3, seed=0)
    assert inertia(points, torch.ones(12), found) == pytest.approx(0, abs=1e-10)


def test_too_few_points() -> None:
    with pytest.raises(ValueError, match="3 points are fewer than k = 4"):
        kmeans(torch.rand(3, 2), torch.ones(3), 4, iterations=1, seed=0)
