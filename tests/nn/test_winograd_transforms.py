"""Compiled transforms against the same written out: values within rounding, threads, workspace."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.winograd_reference import Reference
from torch import Tensor

from dalle_scale.nn import winograd_transforms as transforms
from dalle_scale.nn.conv import convolve
from dalle_scale.nn.winograd_transforms import Block

CASES = [  # B, H, W, C, width; samples; rows of tiles
    ((1, 4, 4, 1, 8), (0, 1), (0, 1)),
    ((3, 12, 20, 5, 8), (0, 3), (0, 3)),
    ((3, 12, 20, 5, 8), (1, 2), (0, 1)),
    ((3, 12, 20, 5, 8), (1, 2), (1, 2)),
    ((2, 16, 12, 41, 48), (1, 2), (2, 4)),
    ((2, 16, 4, 66, 66), (0, 2), (0, 4)),
]
ROUNDINGS = 2 * 8 + 4  # of a result at the most: sums of six terms along either side, bias, sum


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not transforms.available():
        pytest.skip("no C compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def compare(run: Callable[..., Tensor], tensors: dict[str, Tensor | None], masks: dict[str, Tensor | None]) -> None:
    """The compiled form in fp64 and fp32 against the reference in fp64, within the rounding errors that the absolute
    values of all terms allow. run: called with the functions to take, then the tensors by name."""

    def called(functions: Any, of: Callable[[Tensor], Tensor]) -> Tensor:
        given = {name: None if t is None else of(t.clone()) for name, t in tensors.items()}
        others = {name: None if t is None else t.to(of(t).dtype) for name, t in masks.items()}
        return run(functions, **given, **others).clone()

    double, single = called(transforms, lambda t: t), called(transforms, lambda t: t.float())
    expected = called(Reference(absolute=False), lambda t: t)
    terms = called(Reference(absolute=True), lambda t: t.abs())
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    for ours, dtype in ((double, torch.float64), (single, torch.float32)):
        errors = (ours.double() - expected).abs()
        assert bool((errors <= ROUNDINGS * torch.finfo(dtype).eps * terms).all())
    assert bool((expected != 0).any())


def random(*shape: int, seed: int = 0) -> Tensor:
    """Values that fp32 has, as fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("take", ["take_windows", "take_tiles"])
@pytest.mark.parametrize(("shape", "samples", "rows"), CASES)
def test_taking_apart(
    shape: tuple[int, ...],
    samples: tuple[int, int],
    rows: tuple[int, int],
    take: str,
    relu: bool,
    threads: None,
) -> None:
    block = Block(slice(*samples), slice(*rows))
    maps = random(*shape[:4])
    compare(lambda of, maps: getattr(of, take)(maps, block, shape[4], relu, "first"), {"maps": maps}, {})


@pytest.mark.parametrize("ends", ["nothing", "all", "each", "mask"])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("shape", "samples", "rows"), CASES)
def test_putting_together(
    shape: tuple[int, ...],
    samples: tuple[int, int],
    rows: tuple[int, int],
    windows: bool,
    ends: str,
    threads: None,
) -> None:
    """Also what lies outside the block, which stays, and what is added below it."""
    *map_shape, width = shape
    count, _, columns, channels = map_shape
    block = Block(slice(*samples), slice(*rows))
    tiles = block.tiles(torch.empty(map_shape))
    bias = {"all": random(channels, seed=1), "each": random(count, channels, seed=1)}.get(ends)
    tensors = {
        "products": random(36, tiles, width, seed=2),
        "out": random(*map_shape, seed=3),
        "below": random(block.count, columns, channels, seed=4),
        "bias": bias,
        "add": None if bias is None else random(*map_shape, seed=5),
    }

    def put(
        of: Any, products: Tensor, out: Tensor, below: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor
    ) -> Tensor:
        ends = bias, add, mask
        if windows:
            of.put_windows(products, out, block, below, *ends)
        else:
            of.put_tiles(products, out, block, *ends)
        return torch.cat([out.flatten(), below.flatten()])

    compare(put, tensors, {"mask": random(*map_shape, seed=6) if ends == "mask" else None})


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 8), (3, 41, 48), (20, 66, 66)])
def test_filters(rows: int, columns: int, width: int, transposed: bool, flipped: bool, threads: None) -> None:
    """And their gradient, which is the transposed matrix's."""
    size = (columns, rows) if transposed else (rows, columns)

    def take(of: Any, weight: Tensor) -> Tensor:
        return of.take_filters(weight.transpose(0, 1) if transposed else weight, width, flipped)

    compare(take, {"weight": random(*size, 3, 3)}, {})
    compare(lambda of, places: of.put_filters(places, columns, flipped), {"places": random(36, rows, width)}, {})


@pytest.mark.parametrize("ends", [(False, False, False), (True, True, False), (False, False, True)])
def test_rows(ends: tuple[bool, bool, bool], threads: None) -> None:
    bias, add, mask = (
        random(*size) if given else None for given, size in zip(ends, [(41,), (9, 41), (9, 41)], strict=True)
    )

    def put(of: Any, sums: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor | None) -> Tensor:
        out = sums.new_empty(9, 41)
        of.put_rows(sums, out, bias, add, mask)
        return out

    compare(put, {"sums": random(9, 48, seed=1), "bias": bias, "add": add}, {"mask": mask})


@pytest.mark.parametrize("take", [transforms.take_windows, transforms.take_tiles])
def test_what_is_no_number_stays_none(take: Callable[..., Tensor], threads: None) -> None:
    """Through relu, in its own channel: those that fill up stay 0."""
    maps, block = random(1, 8, 8, 5), Block(slice(0, 1), slice(0, 2))
    maps[0, 3, 3, 4], maps[0, 7, 7, 0] = torch.nan, torch.inf
    found = take(maps, block, 8, True, "first")
    assert torch.equal(found[..., 5:], torch.zeros_like(found[..., 5:]))
    assert bool(found[..., 4].isnan().any()) and not bool(found[..., 1:4].isnan().any())


def gradients(seed: int) -> list[Tensor]:
    """Of a convolution that is large enough for its own way."""
    x = random(2, 92, 64, 64, seed=seed).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = random(24, 92, 3, 3, seed=seed + 1).float().requires_grad_()
    out = convolve(x, weight, torch.zeros(24), relu=True)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))]


def test_threads_have_a_workspace_each() -> None:
    expected = [gradients(seed) for seed in (0, 2)]
    found: dict[int, list[list[Tensor]]] = {0: [], 1: []}

    def repeat(number: int) -> None:
        found[number] += [gradients(2 * number) for _ in range(3)]

    workers = [threading.Thread(target=repeat, args=(number,)) for number in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, runs in found.items():
        assert len(runs) == 3
        for run in runs:
            for ours, theirs in zip(run, expected[number], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_a_workspace_begun_in_inference_mode_serves_training() -> None:
    worker_found: list[list[Tensor]] = []

    def work() -> None:  # in a thread, whose workspace is new
        with torch.inference_mode():
            convolve(random(2, 92, 64, 64).float(), random(24, 92, 3, 3).float(), torch.zeros(24))
        worker_found.append(gradients(0))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert len(worker_found) == 1
