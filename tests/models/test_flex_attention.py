"""FlexAttention's masks against those of `visible`, and its results and gradients against dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask
from torch.utils.checkpoint import checkpoint

from dalle_scale.models.transformer import flex
from dalle_scale.models.transformer.attention import attend
from dalle_scale.models.transformer.flex import attend_windows, block_mask, rule, turned, works
from dalle_scale.models.transformer.masks import Kind, Layout, visible

SPARSE: tuple[Kind, ...] = ("row", "column", "conv")
PAPER = Layout(258, 32)
LAYOUTS = [Layout(2, 4, 3), Layout(2, 5), Layout(7, 8, 5), Layout(9, 13, 1), Layout(3, 16, 11), Layout(1, 7, 21)]


def dense(query, key, value, block_mask):
    """In place of the kernel: attention under the rule of a block mask, with gradients on a CPU."""
    length = query.shape[2]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=create_mask(block_mask.mask_mod, 1, 1, length,
                                                                                   length, query.device))  # fmt: skip


def inputs(layout, dtype=torch.float32, device="cpu"):
    """Queries, keys and values as the projections leave them: heads inside."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 2, layout.length, 3, 16, generator=generator).to(device, dtype)
    return [states.transpose(1, 2).requires_grad_() for states in drawn]


@pytest.fixture
def plain(monkeypatch):
    """Without a compiler."""
    torch.compiler.reset()  # each mask is another function to it, and it takes eight
    monkeypatch.setattr(flex, "_kernel", lambda: flex._attend)
    monkeypatch.setattr(flex, "_tried", {})
    flex._say_dense.cache_clear()


@pytest.mark.parametrize("layout", [*LAYOUTS, PAPER], ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_the_rule_is_visible(kind, layout):
    """Every query with every key, and no block that holds a pair is left out."""
    states = torch.arange(layout.length)
    seen = rule(kind, layout)(states, states, states[:, None], states[None, :])
    want = visible(kind, layout)
    if kind == "column":
        order = turned(states.view(1, 1, -1, 1), layout.prefix, layout.grid).flatten()
        want = want[order][:, order]
    assert torch.equal(seen, want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_equals_dense_attention(plain, kind, layout):
    query, key, value = (tensor.detach() for tensor in inputs(layout))
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=visible(kind, layout))
    torch.testing.assert_close(attend_windows(query, key, value, kind, layout), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", SPARSE)
def test_gradients_equal_those_of_dense_attention(plain, monkeypatch, kind):
    """FlexAttention itself has none on a CPU: with another kernel under the same masks and turns."""
    monkeypatch.setattr(flex, "flex_attention", dense)
    layout = Layout(5, 6, 3)
    tensors = inputs(layout, torch.float64)
    slope = torch.randn(2, 3, layout.length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad(F.scaled_dot_product_attention(*tensors, visible(kind, layout)), tensors, slope)
    got = torch.autograd.grad(attend_windows(*tensors, kind, layout), tensors, slope)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def blocks(kind, layout):
    """Computed blocks, and all."""
    mask = block_mask(kind, layout, torch.device("cpu"))
    across = -(-layout.length // flex.BLOCK)
    return int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()), across**2


def test_blocks_at_the_papers_size(monkeypatch):
    """What the module's docstring says; every block below the diagonal holds a state of some column in raster order."""
    assert [blocks(kind, PAPER) for kind in SPARSE] == [(45, 121), (45, 121), (51, 121)]
    seen = F.pad(visible("column", PAPER), (0, 126, 0, 126)).view(11, 128, 11, 128).transpose(1, 2).flatten(2)
    assert seen.any(-1).sum() == 66


@pytest.mark.parametrize("grid", [32, 48])
@pytest.mark.parametrize("kind", SPARSE)
def test_computed_blocks_grow_as_the_mask_does(kind, grid):
    """Not as length²: a band of windows, and a stripe for the prefix."""
    layout = Layout(2, grid)
    across = -(-layout.length // flex.BLOCK)
    reach = {"row": grid, "column": grid, "conv": 5 * grid + 5}[kind]
    assert blocks(kind, layout)[0] <= across * (3 + -(-reach // flex.BLOCK))


def test_works_where_a_trial_works(plain, monkeypatch, capsys):
    layout = Layout(2, 12)
    calls = []
    monkeypatch.setattr(flex, "flex_attention", lambda *args, **kw: calls.append(0) or dense(*args, **kw))
    tensors = inputs(layout)
    assert works(*tensors, "row", layout) and works(*tensors, "row", layout)
    assert len(calls) == 1  # tried once
    assert not works(*tensors, "row", Layout(2, 4))  # one block: nothing to skip
    assert len(calls) == 1 and not capsys.readouterr().out


def test_what_fails_is_said_once(plain, capsys):
    """As FlexAttention does with gradients on a CPU."""
    layout = Layout(2, 12)
    for kind in SPARSE:
        assert not works(*inputs(layout), kind, layout)
    [line] = capsys.readouterr().out.splitlines()
    assert "computed densely" in line and "NotImplementedError: FlexAttention does not support backward on CPU" in line


def test_memory_that_ran_out_is_not_a_reason_for_dense_attention(plain, monkeypatch):
    def full(*_args, **_kw):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(flex, "flex_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        works(*inputs(Layout(2, 12)), "row", Layout(2, 12))


def test_a_trial_under_activation_checkpointing(plain, monkeypatch):
    """What the trial saves for its backward pass would be missed in the recomputation, which does not try again."""
    monkeypatch.setattr(flex, "flex_attention", dense)
    layout = Layout(2, 12)

    def layer(*tensors):
        assert works(*tensors, "column", layout)
        return attend_windows(*tensors, "column", layout)

    tensors = inputs(layout)
    checkpoint(layer, *tensors, use_reentrant=False).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


def test_masks_asked_for_first_while_sampling_serve_training():
    block_mask.cache_clear()
    with torch.inference_mode():
        mask = block_mask("row", Layout(2, 4), torch.device("cpu"))
    assert not mask.kv_indices.is_inference()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.float32, 1e-4)])
@pytest.mark.parametrize("layout", [Layout(2, 12), Layout(34, 16, 5), PAPER], ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_on_a_gpu(kind, layout, dtype, tolerance):
    """The compiled kernel, if there is one here, and what stands in for it: results and gradients."""
    torch.compiler.reset()
    tensors = inputs(layout, dtype, "cuda")
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    got, want = attend(*tensors, kind, layout), F.scaled_dot_product_attention(*exact, visible(kind, layout))
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)
    slope = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(got, tensors, slope.to(got)), torch.autograd.grad(want, exact, slope)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=5 * tolerance, atol=5 * tolerance)
