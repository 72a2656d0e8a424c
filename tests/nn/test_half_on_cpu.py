"""In 16 bits on CPUs: fp32 inside, rounded once, types kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle_scale.nn.half_on_cpu import GroupNorm, attend_all, attention_kernel

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_attention(dtype: torch.dtype, causal: bool) -> None:
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 7, 8).to(dtype).requires_grad_() for _ in range(3)]
    wide = [state.detach().float().requires_grad_() for state in states]
    got, want = attend_all(*states, is_causal=causal), F.scaled_dot_product_attention(*wide, is_causal=causal)
    assert torch.equal(got, want.to(dtype))
    slope = torch.randn(got.shape).to(dtype)
    for ours, exact in zip(
        torch.autograd.grad(got, states, slope), torch.autograd.grad(want, wide, slope.float()), strict=True
    ):
        assert torch.equal(ours, exact.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_group_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    part = GroupNorm(4, 8).to(dtype)
    x = torch.randn(2, 8, 5, 6).to(dtype)
    want = F.group_norm(x.float(), 4, part.weight.float(), part.bias.float(), part.eps)
    spacing = 2 * torch.finfo(dtype).eps  # of numbers up to 4; the plain way computes in fp32 too and rounds once
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        got = part(laid_out.requires_grad_())
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=spacing, atol=spacing)
        assert torch.autograd.grad(got.sum(), x if laid_out is x else laid_out)[0].dtype == dtype


def test_other_types_are_torchs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    ours, plain = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    assert torch.equal(ours(x), plain(x)) and ours.state_dict().keys() == plain.state_dict().keys()
    query = torch.randn(1, 2, 5, 8)
    assert torch.equal(attend_all(query, query, query), F.scaled_dot_product_attention(query, query, query))


def test_kernel_for_other_libraries() -> None:
    """In 16 bits near fp32, forwards and backwards."""
    torch.manual_seed(0)
    part, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    want = part(x, x, x, need_weights=False)[0]
    short = part.bfloat16()
    with attention_kernel(x.bfloat16()):
        got = short(x.bfloat16(), x.bfloat16(), x.bfloat16(), need_weights=False)[0]
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    got.sum().backward()
    assert short.in_proj_weight.grad.dtype == torch.bfloat16
