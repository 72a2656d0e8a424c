"""Attention in blocks against dense attention with the same mask: results, gradients, and the keys that are met."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_scale.models.transformer import cpu_sparse
from dalle_scale.models.transformer.cpu_sparse import attend_blocks, blocks
from dalle_scale.models.transformer.masks import Kind, Layout, visible

SPARSE: tuple[Kind, ...] = ("row", "column", "conv")
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", SPARSE)
@settings(max_examples=25, deadline=None)
@given(
    prefix=st.integers(1, 7),
    grid=st.integers(1, 9),
    kernel=st.sampled_from((1, 3, 5, 11)),
    group_bytes=st.sampled_from((1, 20_000, 1 << 23)),
    seed=st.integers(0, 99),
)
def test_equals_dense_attention(kind, prefix, grid, kernel, group_bytes, seed):
    """With scores so large that the shares of prefix and image differ widely."""
    layout, generator = Layout(prefix, grid, kernel), torch.Generator().manual_seed(seed)
    sizes = (2, layout.length, 3, 8)  # as the projections leave them: heads inside
    inputs = [torch.randn(sizes, dtype=torch.float64, generator=generator).transpose(1, 2) for _ in range(3)]
    query, key, value = [tensor.requires_grad_() for tensor in (4 * inputs[0], *inputs[1:])]
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=visible(kind, layout))
    slope = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_sparse, "GROUP_BYTES", group_bytes)
        got = attend_blocks(query, key, value, kind, layout)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(out, (query, key, value), slope) for out in (got, want)]
    for ours, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_16_bits(dtype, tolerance):
    layout = Layout(5, 4, 3)
    query, key, value = torch.randn(3, 2, 3, layout.length, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for kind in SPARSE:
        got = attend_blocks(query.to(dtype), key.to(dtype), value.to(dtype), kind, layout)
        want = F.scaled_dot_product_attention(query, key, value, attn_mask=visible(kind, layout))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", [8, 16, 32, 64])
def test_a_query_meets_few_keys_that_it_does_not_see(grid):
    """Besides the prefix, which all see; the conv layer's window does not grow with the grid."""
    layout = Layout(1, grid)
    met = {kind: blocks(kind, layout, torch.float32, CPU).keys.shape[1] for kind in SPARSE}
    assert met["row"] == 2 * grid and met["column"] == grid
    assert met["conv"] <= 6 * (16 + 10)
    for kind in SPARSE:
        cut = blocks(kind, layout, torch.float32, CPU)
        states = torch.arange(grid**2)[None]
        assert torch.equal(cut.cut(states).flatten().sort().values, states[0])
        assert torch.equal(cut.merge(cut.cut(states)), states)
        assert (cut.bias == 0).sum() == visible(kind, layout)[1:, 1:].sum()
