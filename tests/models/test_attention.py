"""Masks against the paper's figures and brute force, attention against a dense softmax, the cache against both."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from dalle_scale.models.transformer.attention import Attention, attend
from dalle_scale.models.transformer.kv_cache import KVCache
from dalle_scale.models.transformer.masks import Kind, Layout, visible

KINDS: tuple[Kind, ...] = get_args(Kind)
PREFIX = 3


def image_keys(kind: Kind, layout: Layout, query: int) -> list[int]:
    """Codes that image state `query` sees."""
    return visible(kind, layout)[layout.prefix + query, layout.prefix :].nonzero().flatten().tolist()


def brute_force(kind: Kind, layout: Layout) -> torch.Tensor:
    """The masks from row and column numbers, one pair of states at a time."""
    side, reach = layout.grid, layout.conv_kernel // 2
    seen = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for query, key in itertools.product(range(layout.length), repeat=2):
        if key < layout.prefix or query < layout.prefix:
            seen[query, key] = key <= query
            continue
        (row, column), (key_row, key_column) = divmod(query - layout.prefix, side), divmod(key - layout.prefix, side)
        if kind == "full":
            sees = True
        elif kind == "row":  # what is left of it in its row, and the previous row from its own column on
            sees = key_row == row or (key_row == row - 1 and key_column >= column)
        elif kind == "column":
            sees = key_column == column
        else:  # a window cell beyond a row's end is the cell that comes next in raster order
            window = itertools.product(range(-reach, 1), range(-reach, reach + 1))
            cells = [(row + down) * side + column + right for down, right in window]
            sees = key - layout.prefix in cells
        seen[query, key] = sees and key <= query
    return seen


def test_row_mask_is_the_papers_figure():
    layout = Layout(prefix=PREFIX, grid=4)
    assert image_keys("row", layout, 15) == [11, 12, 13, 14, 15]  # five with itself, across the row end
    assert image_keys("row", layout, 4) == [0, 1, 2, 3, 4]
    assert image_keys("row", layout, 2) == [0, 1, 2]


def test_column_mask_is_the_papers_figure():
    assert image_keys("column", Layout(prefix=PREFIX, grid=4), 14) == [2, 6, 10, 14]


def test_conv_mask_is_the_papers_figure():
    layout = Layout(prefix=PREFIX, grid=4, conv_kernel=3)
    assert image_keys("conv", layout, 10) == [5, 6, 7, 9, 10]
    assert image_keys("conv", layout, 8) == [3, 4, 5, 7, 8]  # left edge: continues at the end of the row above
    assert image_keys("conv", layout, 11) == [6, 7, 8, 10, 11]  # right edge


@pytest.mark.parametrize("grid, kernel", [(1, 11), (2, 3), (3, 1), (4, 3), (4, 11), (5, 5), (6, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_brute_force(kind, grid, kernel):
    layout = Layout(prefix=PREFIX, grid=grid, conv_kernel=kernel)
    assert torch.equal(visible(kind, layout), brute_force(kind, layout))


def test_key_counts_at_the_papers_size():
    layout = Layout(prefix=258, grid=32)
    counts = {kind: len(image_keys(kind, layout, 1023)) for kind in KINDS}
    assert counts == {"full": 1024, "row": 33, "column": 32, "conv": 5 * 11 + 6}


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_causal_and_seen_by_every_image_state(kind):
    layout = Layout(prefix=5, grid=4, conv_kernel=3)
    mask = visible(kind, layout)
    assert torch.equal(mask[:5, :5], torch.ones(5, 5, dtype=torch.bool).tril())
    assert mask[5:, :5].all()
    assert not mask.triu(1).any()
    assert mask.diagonal().all()


@pytest.mark.parametrize("kind", KINDS)
def test_attend_is_one_dense_softmax_over_the_visible_keys(kind):
    torch.manual_seed(0)
    layout = Layout(prefix=PREFIX, grid=4, conv_kernel=3)
    query, key, value = torch.randn(3, 2, 2, layout.length, 8, dtype=torch.float64)
    scores = (query @ key.transpose(-1, -2) / 8**0.5).masked_fill(~brute_force(kind, layout), -torch.inf)
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(attend(query, key, value, kind, layout), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_exactly_the_visible_states(kind):
    torch.manual_seed(0)
    layout = Layout(prefix=PREFIX, grid=3, conv_kernel=3)
    attention = Attention(width=8, heads=2, kind=kind, layout=layout)
    x = torch.randn(1, layout.length, 8, requires_grad=True)
    out = attention(x)
    reached = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for query in range(layout.length):
        (gradient,) = torch.autograd.grad(out[0, query].pow(2).sum(), x, retain_graph=True)
        reached[query] = gradient[0].abs().sum(-1) > 0
    assert torch.equal(reached, brute_force(kind, layout))


@pytest.mark.parametrize("prefix_index", [[1, 0, 1], [0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [2, 2, 0, 1, 2]])
@pytest.mark.parametrize("grid, kernel", [(1, 3), (2, 3), (3, 1), (5, 3), (5, 5), (6, 5), (9, 5), (4, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_gives_the_attention_of_whole_sequences(kind, grid, kernel, prefix_index):
    """With states of the shapes that there are, and of fixed ones; each form with a cache of its own."""
    torch.manual_seed(0)
    layout = Layout(prefix=PREFIX, grid=grid, conv_kernel=kernel)
    attention = Attention(width=8, heads=2, kind=kind, layout=layout).double()
    prefix_index = torch.tensor(prefix_index)
    prefixes = torch.randn(int(prefix_index.max()) + 1, PREFIX, 8, dtype=torch.float64)
    images = torch.randn(len(prefix_index), grid**2, 8, dtype=torch.float64)
    whole = attention(torch.cat([prefixes[prefix_index], images], dim=1))
    by_number, by_tensor = KVCache(kind, layout, prefix_index), KVCache(kind, layout, prefix_index)
    for cache in (by_number, by_tensor):
        torch.testing.assert_close(attention(prefixes, cache)[prefix_index], whole[:, :PREFIX])
    for index in range(grid**2):
        query, key, value = (of(images[:, index]) for of in (attention.query, attention.key, attention.value))
        states = torch.stack([query / (8 / 2) ** 0.5, key, value], dim=1).view(len(prefix_index), 3, 2, 4)
        for cache, place in ((by_number, index), (by_tensor, torch.tensor([index]))):
            step = attention.output(cache.decode_step(states, place).view(len(prefix_index), 8))
            torch.testing.assert_close(step, whole[:, PREFIX + index])


@pytest.mark.parametrize("kind, states", [("row", 33), ("conv", 5 * 32 + 5 * 11 + 6), ("column", 1024), ("full", 1024)])
def test_cache_keeps_what_the_layer_looks_back_to(kind, states):
    """Of the window also what lies ready to be read; and one prefix for all samples of a caption."""
    layout = Layout(prefix=2, grid=32)
    attention = Attention(width=4, heads=1, kind=kind, layout=layout)
    cache = KVCache(kind, layout, torch.zeros(3, dtype=torch.int64))
    attention(torch.randn(1, 2, 4), cache)
    assert [tensor.numel() for tensor in (cache._prefix_keys, cache._prefix_values)] == [2 * 4, 2 * 4]
    kept = [
        value.numel() for value in vars(cache.image).values() if torch.is_tensor(value) and value.is_floating_point()
    ]
    assert sum(kept) == 3 * states * (4 + 4) == 3 * cache.image.states * (4 + 4)


def test_masks_asked_for_first_while_sampling_serve_training():
    """A tensor made in inference mode could not be saved for backward."""
    layout = Layout(prefix=2, grid=3, conv_kernel=7)
    attention = Attention(width=4, heads=1, kind="column", layout=layout)
    x = torch.randn(1, layout.length, 4)
    with torch.inference_mode():
        attention(x)
    attention(x).sum().backward()
    assert attention.value.weight.grad is not None
