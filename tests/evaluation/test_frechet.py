"""Distances of sets of features against closed forms, numpy without shortcuts, and what must hold for any set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dalle_scale.evaluation.metrics import distribution


def rng(count: int, dimensions: int, seed: int = 0, mix: float = 0.5) -> torch.Tensor:
    """Correlated vectors float32 [count, dimensions] whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, dimensions, generator=generator)
    mixing = torch.eye(dimensions) + mix * torch.randn(dimensions, dimensions, generator=generator)
    return noise @ mixing + torch.randn(dimensions, generator=generator)


def moments(features: torch.Tensor, batch: int) -> distribution.Moments:
    found = distribution.Moments(features.shape[1])
    for part in torch.split(features, batch):
        found.add(part)
    return found


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    one, other = moments(first, 64), moments(second, 64)
    return distribution.frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_streamed_moments_are_those_of_the_whole(batch):
    features = rng(500, 6)
    found = moments(features, batch)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, features.double().numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)


def test_moments_far_from_zero():
    """Where sums of squares have no digits left: 1e8 squared is 1e16, the variance 1."""
    features = rng(400, 3).double()
    near, far = moments(features, 50), moments(features + 1e8, 50)
    torch.testing.assert_close(far.covariance, near.covariance, rtol=1e-6, atol=1e-6)


def test_moments_of_fp32_features_are_summed_in_float64():
    """50,000 features, where fp32 sums stand still."""
    features = rng(50_000, 2) + 300
    found = moments(features, 100)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


def test_empty_batches_change_nothing():
    features = rng(20, 3)
    found = moments(features, 5)
    found.add(features[:0])
    assert torch.equal(found.mean, moments(features, 5).mean) and found.count == 20


def test_same_set_has_distance_zero():
    features = rng(300, 40)
    scale = float(moments(features, 64).covariance.trace())
    assert abs(distance(features, features)) < 1e-12 * scale
    assert abs(distance(features, features.flip(0))) < 1e-12 * scale, "the order of the images does not matter"


def test_nearly_singular_covariances_cost_no_digits():
    """Variances from 1 down to 1e-14: square roots of the eigenvalues of a product would be wrong by 1e-8 each."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=generator)).Q
    variances = torch.logspace(0, -14, 60, dtype=torch.float64)
    covariance = (rotation * variances) @ rotation.T
    mean = torch.zeros(60, dtype=torch.float64)
    assert abs(distribution.frechet_distance(mean, covariance, mean, covariance)) < 1e-13
    got = distribution.frechet_distance(mean, covariance, mean, 4 * covariance)
    assert got == pytest.approx(float(variances.sum()), rel=1e-12), "(2 - 1)^2 times the trace"


def test_closed_form_of_commuting_gaussians():
    """The same axes: sum of (m - m')^2 and of (s - s')^2."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    s, t = torch.tensor([1.0, 2, 3, 0.5, 0.1]).double(), torch.tensor([2.0, 2, 1, 4, 3]).double()
    m, n = torch.tensor([0.0, 1, 2, 3, 4]).double(), torch.tensor([1.0, 1, 0, 3, -1]).double()
    got = distribution.frechet_distance(m, (rotation * s**2) @ rotation.T, n, (rotation * t**2) @ rotation.T)
    assert got == pytest.approx(float(((m - n) ** 2).sum() + ((s - t) ** 2).sum()), rel=1e-12)


def test_closed_form_in_two_dimensions():
    """There tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)), whether or not A and B commute."""
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    assert not torch.allclose(a @ b, b @ a)
    zero = torch.zeros(2, dtype=torch.float64)
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    expected = float(a.trace() + b.trace()) - 2 * root
    assert distribution.frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)


def test_distance_against_eigenvalues_of_the_product():
    first, second = rng(400, 12), rng(300, 12, seed=1)
    x, y = first.double().numpy(), second.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    trace = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.trace(a) + np.trace(b) - 2 * trace
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_no_covariance_is_no_distance():
    zero, one = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="no covariance"):
        distribution.frechet_distance(zero, -one, zero, one)


def test_kernel_distance_against_loops():
    first, second = rng(9, 4), rng(7, 4, seed=1)
    got = list(distribution.kernel_distances(first, second, subset=5, subsets=3, seed=11))
    random = np.random.RandomState(11)
    for value in got:
        x = first.double().numpy()[random.choice(9, 5, replace=False)]
        y = second.double().numpy()[random.choice(7, 5, replace=False)]

        def k(a: np.ndarray, b: np.ndarray) -> float:
            return float((a @ b / 4 + 1) ** 3)

        within = sum(k(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
        between = sum(k(a, b) for a in x for b in y) / 25
        assert value == pytest.approx(within - 2 * between, rel=1e-10)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    """Two samples of one distribution: 0 within the error of the mean; the biased estimate would be far above."""
    first, second = torch.split(rng(8000, 8, mix=0.1), 4000)
    values = np.array(list(distribution.kernel_distances(first, second, subset=20, subsets=300, seed=0)))
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    moved = np.array(list(distribution.kernel_distances(first, second + 0.5, subset=20, subsets=300, seed=0)))
    assert moved.mean() > 10 * error
    again = list(distribution.kernel_distances(first, second, subset=20, subsets=300, seed=0))
    assert again == values.tolist() and again != list(distribution.kernel_distances(first, second, 20, 300, seed=1))


def test_inception_score_in_closed_form():
    sure = torch.eye(10).repeat(10, 1) * 1000  # every split of 50 has each class five times
    order = np.argsort(np.random.RandomState(3).permutation(100))
    blocks = sure[torch.from_numpy(order)]  # which the shuffle puts back
    np.testing.assert_allclose(distribution.inception_scores(blocks, 2, 3), [10, 10], rtol=1e-12)
    np.testing.assert_allclose(distribution.inception_scores(torch.zeros(100, 10), 10, 3), np.ones(10), rtol=1e-12)


def test_inception_score_against_numpy():
    logits = rng(103, 7)
    shuffled = logits.double().numpy()[np.random.RandomState(5).permutation(103)]
    p = np.exp(shuffled) / np.exp(shuffled).sum(axis=1, keepdims=True)
    expected = []
    for part in range(4):
        rows = p[part * 103 // 4 : (part + 1) * 103 // 4]
        expected.append(np.exp((rows * np.log(rows / rows.mean(axis=0))).sum(axis=1).mean()))
    np.testing.assert_allclose(distribution.inception_scores(logits, 4, 5), expected, rtol=1e-12)


def test_precision_and_recall_against_loops():
    samples, real = rng(60, 3, mix=0.2) + 0.7, rng(50, 3, seed=4, mix=0.2)
    for points, centres in ((samples, real), (real, samples)):
        x, c = points.double().numpy(), centres.double().numpy()
        radii = [sorted(np.linalg.norm(a - b) for j, b in enumerate(c) if j != i)[2] for i, a in enumerate(c)]
        expected = np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(c, radii, strict=True)) for a in x])
        got = distribution.neighbour_radii(centres, 3)
        np.testing.assert_allclose(got, radii, rtol=1e-7)
        assert 0 < expected < 1 and distribution.covered_share(points, centres, got) == expected


def test_precision_and_recall_at_the_ends(monkeypatch):
    monkeypatch.setattr(distribution, "_ROWS", 16)  # several parts
    features = rng(100, 40)
    radii = distribution.neighbour_radii(features, 3)
    assert distribution.covered_share(features, features, radii) == 1
    assert distribution.covered_share(features + 1000, features, radii) == 0
    few = features[:5].repeat(20, 1)  # a generator that knows five images: precise, and recalls hardly more than these
    assert distribution.covered_share(few, features, radii) == 1
    assert distribution.covered_share(features, few, distribution.neighbour_radii(few, 3)) <= 0.05
