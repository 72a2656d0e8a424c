"""Causal parts against brute force, causality by gradient, reach, and pixel by pixel against whole squares."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale.models.pixelsnail import layers
from dalle_scale.models.pixelsnail.layers import CausalAttention, Decoding, RowBuffer
from dalle_scale.models.pixelsnail.model import CaptionMean, PixelSNAIL
from dalle_scale.nn.causal_conv import CausalConv

GRID, VOCAB = 4, 7
TOP = {"attention_blocks": 1}
BOTTOM = {"upper_grids": (2,), "conditioning_layers": 1}
ALL = {
    **TOP, "upper_grids": (1, 2), "conditioning_layers": 2, "text_vocab": 5, "text_length": 3, "output_layers": 2,
    "kernel": 5,
}  # fmt: skip


def make(**changes) -> PixelSNAIL:
    """A net in which every part matters: no weight is left near zero."""
    torch.manual_seed(0)
    sizes = {"vocab": VOCAB, "grid": GRID, "width": 8, "residual_width": 6, "layers": 2, "kernel": 3, "heads": 2}
    model = PixelSNAIL(**{**sizes, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def make_inputs(model: PixelSNAIL, count: int = 2) -> tuple[Tensor, Tensor | None, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(VOCAB, (count, model.grid**2), generator=generator)
    upper = text = None
    if model.upper is not None:
        cells = sum(grid**2 for grid in model.upper.grids)
        upper = torch.randint(VOCAB, (count, cells), generator=generator)
    if model.caption is not None:
        text = torch.randint(5, (count, 3), generator=generator)
        text[:, -1] = 5 + 2
    return codes, upper, text


def influence(model: PixelSNAIL, table: nn.Module) -> Tensor:
    """Largest |d logits[p] / d rows[q]|, [positions p, rows q], of the rows that `table` gives a sample."""
    kept: list[Tensor] = []
    handle = table.register_forward_hook(lambda module, inputs, output: kept.append(output.requires_grad_()))
    codes, upper, text = make_inputs(model, count=1)
    logits = model(codes, upper, text)
    handle.remove()
    torch.manual_seed(2)
    grads = [
        torch.autograd.grad((logits[0, p] * torch.randn(VOCAB)).sum(), kept[0], retain_graph=True)[0]
        for p in range(logits.shape[1])
    ]
    return torch.stack([grad.abs().amax(dim=-1).flatten() for grad in grads])


def convolved(conv: CausalConv, x: Tensor, strict: bool) -> Tensor:
    """Sum over the visible taps, one by one: [B, H, W, C]."""
    reach, (batch, height, width, _) = conv.reach, x.shape
    y = conv.bias.expand(batch, height, width, -1).clone()
    for row, column in itertools.product(range(height), range(width)):
        for up, right in itertools.product(range(reach + 1), range(-reach, reach + 1)):
            seen = up > 0 or right < 0 or (right == 0 and not strict)
            if seen and row - up >= 0 and 0 <= column + right < width:
                tap = conv.above[:, :, reach - up, right + reach] if up else conv.left[:, :, 0, right + reach]
                y[:, row, column] += x[:, row - up, column + right] @ tap.T
    return y


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_causal_convolution(kernel, strict):
    torch.manual_seed(0)
    conv, x = CausalConv(3, 5, kernel, strict), torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(conv(x), convolved(conv, x, strict), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_rows_give_the_convolution_pixel_by_pixel(strict):
    torch.manual_seed(0)
    conv, x, extra = CausalConv(3, 5, 5, strict), torch.randn(2, 6, 6, 3), torch.randn(2, 6, 6, 5)
    rows, got = RowBuffer(conv, 2, 6), torch.empty(2, 6, 6, 5)
    with torch.no_grad():
        for row, column in itertools.product(range(6), range(6)):
            if column == 0:
                rows.start_row(extra[:, row])
            if not strict:
                rows.put(x[:, row, column], column)
            got[:, row, column] = rows.read(column)
            if strict:
                rows.put(x[:, row, column], column)
        torch.testing.assert_close(got, conv(x) + extra, rtol=1e-5, atol=1e-5)


def test_attention_is_a_softmax_over_earlier_pixels_and_nothing():
    torch.manual_seed(0)
    attention = CausalAttention(8, 2, gain=1.0)
    x, embedded = torch.randn(1, 3, 3, 8), torch.randn(1, 3, 3, 8)
    mixed: list[Tensor] = []
    attention.merge.register_forward_pre_hook(lambda module, inputs: mixed.append(inputs[1]))
    attention(x, embedded, None)
    state = attention.norm(x).view(9, 8)
    content = torch.cat([state, embedded.view(9, 8)], dim=1)
    query, key, value = attention.query(state), attention.key(content), attention.value(content)
    for pixel, head in itertools.product(range(9), (slice(0, 4), slice(4, 8))):
        weights = (key[:pixel, head] @ query[pixel, head] / 2).exp()
        want = (weights @ value[:pixel, head]) / (1 + weights.sum())  # exp(0) = 1: the key of zeros
        torch.testing.assert_close(mixed[0].view(9, 8)[pixel, head], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, TOP, BOTTOM, ALL], ids=["plain", "top", "bottom", "all"])
def test_no_code_sees_itself_or_a_later_one(changes):
    model = make(**changes)
    later = torch.ones(GRID**2, GRID**2, dtype=torch.bool).triu()
    assert torch.all(influence(model, model.code)[later] == 0)


@pytest.mark.parametrize("changes", [TOP, ALL], ids=["top", "all"])
def test_attention_reaches_every_earlier_code(changes):
    model = make(**changes)
    earlier = torch.ones(GRID**2, GRID**2, dtype=torch.bool).tril(-1)
    assert torch.all(influence(model, model.code)[earlier] > 0)


def test_convolutions_alone_reach_what_their_windows_chain_to():
    """Beside it the reach is not everything: the corner above and far to the right stays unseen."""
    grid = 6
    model = make(grid=grid, layers=1, kernel=3)  # three convolutions in a row
    rows, columns = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    up, right = rows[:, None] - rows, columns - columns[:, None]  # of q as seen from p
    window = ((up == 1) & (right.abs() <= 1)) | ((up == 0) & (right == -1))
    strict, inclusive = window.float(), (window | torch.eye(grid**2, dtype=torch.bool)).float()
    want = (inclusive @ inclusive @ strict) > 0
    assert torch.equal(influence(model, model.code) > 0, want)
    assert not want[grid, grid - 1]


def test_every_upper_code_reaches_the_pixels_below_it():
    model = make(**ALL)
    assert model.upper is not None
    coarsest, finest = (influence(model, table) for table in model.upper.codes)
    assert torch.all(coarsest > 0)
    pixels, cells = torch.arange(GRID**2), torch.arange(4)
    below = (pixels // GRID // 2 * 2 + pixels % GRID // 2)[:, None] == cells
    assert torch.all(finest[below] > 0)


def test_caption_reaches_every_pixel_but_not_its_pads():
    model = make(**ALL)
    assert model.caption is not None
    reached = influence(model, model.caption.token)
    assert torch.all(reached[:, :2] > 0) and torch.all(reached[:, 2] == 0)


def test_caption_is_a_mean_over_its_tokens():
    torch.manual_seed(0)
    caption = CaptionMean(vocab=5, length=3, width=4)
    one = caption(torch.tensor([[2, 6, 7]]))
    rows = caption.token.weight[2] + caption.position[0]
    torch.testing.assert_close(one[0], caption.contract(F.gelu(caption.expand(rows))))
    assert torch.all(caption(torch.tensor([[5, 6, 7]])) == 0)
    assert not torch.allclose(caption(torch.tensor([[1, 2, 7]])), caption(torch.tensor([[2, 1, 7]])))


@pytest.mark.parametrize("grid", [2, 4, 8])  # smaller than the window, and larger
@pytest.mark.parametrize("changes", [{}, TOP, BOTTOM, ALL], ids=["plain", "top", "bottom", "all"])
def test_pixel_by_pixel_equals_whole_squares(changes, grid):
    model = make(**{**changes, "grid": grid})
    codes, upper, text = make_inputs(model, count=3)
    with torch.no_grad():
        decoding = model.prefill(3, upper, text)
        steps = [model.decode_step(codes[:, index - 1] if index else None, decoding) for index in range(grid**2)]
        torch.testing.assert_close(torch.stack(steps, dim=1), model(codes, upper, text), rtol=1e-5, atol=1e-5)


def test_decoding_keeps_one_column_of_work_a_pixel():
    """No input of a step grows with the pixels sampled but the keys, and memory is allocated once."""
    model = make(**TOP)
    decoding = model.prefill(1)
    with torch.no_grad():
        model.decode_step(None, decoding)
        cache = decoding.caches[-1]
        assert isinstance(cache, layers.AttentionCache)
        address, seen = cache.buffer._buffer.data_ptr(), []
        handles = [
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
            for module in model.modules()
            if isinstance(module, nn.Linear | nn.LayerNorm)
        ]
        for _ in range(GRID**2 - 1):
            model.decode_step(torch.zeros(1, dtype=torch.int64), decoding)
        for handle in handles:
            handle.remove()
    assert cache.buffer._buffer.data_ptr() == address and max(seen) <= 2 * 8


def test_condition_of_decoding_by_row():
    condition = torch.randn(2, 3, 3, 4)
    decoding = Decoding(2, 3, condition)
    decoding.index = 6
    row = decoding.condition_row()
    assert row is not None and torch.equal(row, condition[:, 2])
    assert Decoding(2, 3, None).condition_row() is None


def test_dropout():
    model = make(dropout=0.5, **TOP)
    codes, _, _ = make_inputs(model)
    seeds = torch.tensor([5, 6])
    off = model(codes)
    assert torch.equal(model(codes, seeds=seeds), off)  # evaluation
    model.train()
    assert torch.equal(model(codes), off)  # no seeds
    on = model(codes, seeds=seeds, step=3)
    assert not torch.allclose(on, off) and not torch.allclose(on, model(codes, seeds=seeds, step=4))
    torch.testing.assert_close(on[1:], model(codes[1:], seeds=seeds[1:], step=3), rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_mean():
    x, share = torch.ones(4, 50, 40), 0.3
    dropped = layers._dropout(x, share, torch.arange(4), counter=7)
    kept = (dropped != 0).float().mean()
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    assert abs(kept - (1 - share)) < 4 * math.sqrt(share * (1 - share) / x.numel())
    again = layers._dropout(x, share, torch.arange(4), counter=8)
    assert 0.55 < ((dropped != 0) == (again != 0)).float().mean() < 0.61  # 0.58 where independent


def test_recomputing_activations_changes_no_gradient():
    model = make(dropout=0.2, **ALL).train()
    inputs, seeds = make_inputs(model), torch.tensor([5, 6])
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        model.zero_grad()
        model(*inputs, seeds=seeds).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert torch.equal(left, right)


def test_starts_at_unit_scale_with_parameters_that_deepspeed_can_share():
    torch.manual_seed(0)
    model = PixelSNAIL(
        vocab=16, grid=8, width=32, residual_width=32, layers=8, attention_blocks=2, heads=4, output_layers=4,
        upper_grids=(4,), conditioning_layers=4,
    )  # fmt: skip
    logits = model(torch.randint(16, (2, 64)), torch.randint(16, (2, 16)))
    assert 0.1 < logits.std() < 1.5
    assert all(parameter.ndim > 0 and parameter.numel() > 0 for parameter in model.parameters())
    assert all(table.weight.is_embedding for table in model.modules() if isinstance(table, nn.Embedding))
