"""The loss in chunks against PyTorch's cross entropy of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dalle_scale.nn import chunked_cross_entropy
from dalle_scale.nn.chunked_cross_entropy import weighted_entropy


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 13 * 5, 1 << 22])
def test_equals_cross_entropy(monkeypatch, rows, chunk_bytes):
    monkeypatch.setattr(chunked_cross_entropy, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(rows)
    states = (5 * torch.randn(rows, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    weight = torch.randn(13, 6, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(13, (rows,), generator=generator)
    shares = torch.rand(rows, dtype=torch.float64, generator=generator)
    want = (F.cross_entropy(states @ weight.T, targets, reduction="none") * shares).sum()
    got = weighted_entropy(states, weight, targets, shares)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(3.5 * loss, (states, weight)) for loss in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_logits_far_out_of_range_stay_finite():
    states, weight = torch.tensor([[1e4, 0.0]]), torch.eye(2)
    for target, want in ((0, 0.0), (1, 1e4)):
        assert weighted_entropy(states, weight, torch.tensor([target]), torch.ones(1)).item() == want


def test_without_gradients_nothing_is_kept():
    states, weight = torch.randn(4, 3), torch.randn(5, 3)
    loss = weighted_entropy(states, weight, torch.arange(4), torch.ones(4))
    assert loss.grad_fn is None
    with torch.no_grad():
        same = weighted_entropy(states.requires_grad_(), weight, torch.arange(4), torch.ones(4))
    assert torch.equal(loss, same)
