"""The vector quantizer on two ranks against one process that has the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from support.processes import in_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_scale import dist
from dalle_scale.nn import vector_quantizer
from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig

BATCH, STEPS = 8, 6
FIRST_SEED = 525  # with others a vector may lie between two codes as exactly as `choices_are_clear` refuses
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "restarts": {"restart_below": 1.0},
    "kmeans": {"restart_below": 1.0, "init": "kmeans"},
    "sphere": {"restart_below": 1.0, "cosine": True, "code_dim": 3},
}


class Net(nn.Module):
    """An encoder of one layer and a quantizer."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 6, 1)
        self.quantizer = Quantizer(QuantizerConfig(vocab=16, **values), 6)

    def forward(self, x: Tensor, weight: Tensor, seeds: Tensor) -> Tensor:
        quantized = self.quantizer(self.encoder(x), weight, seeds)
        total: Tensor = (quantized.values.square().mean(dim=(1, 2, 3)) + quantized.loss) * weight
        return total.mean()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [8, 3, 4, 4], weights (one slot is empty) and seeds of a step."""
    generator = torch.Generator().manual_seed(FIRST_SEED + step)
    weight = torch.ones(BATCH)
    weight[step] = 0
    return torch.randn(BATCH, 3, 4, 4, generator=generator), weight, torch.arange(BATCH) + BATCH * step


def train(net: Net, parts: list[slice], recompute: bool) -> list[dict[str, Tensor]]:
    """Move the codes by this rank's micro-batches `parts` of every update; buffers after each."""
    history = []
    for step in range(STEPS):
        for part in parts:
            arguments = [tensor[part] for tensor in batch(step)]
            total = checkpoint(net, *arguments, use_reentrant=False) if recompute else net(*arguments)
            total.backward()
        net.quantizer.after_step(step)
        history.append({name: value.clone() for name, value in net.named_buffers()})
    return history


def fresh(values: dict[str, Any], seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(values)


def start(net: Net) -> None:
    """What the stage does on rank 0 before the nets are shared."""
    if net.quantizer.config.init == "kmeans":
        with torch.no_grad():
            net.quantizer.initialize(net.encoder(batch(STEPS)[0]).permute(0, 2, 3, 1).flatten(0, 2))


def on_rank(rank: int, folder: str) -> None:
    """Nets built before there is a group, from a seed of this rank; all cases and ways to spread a batch."""
    from dalle_scale.engine import build

    nets = {name: [fresh(values, 100 * rank) for _ in range(3)] for name, values in CASES.items()}
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    half = BATCH // 2
    whole = [slice(rank * half, (rank + 1) * half)]
    quarters = [slice(rank * half + at, rank * half + at + 2) for at in (0, 2)]
    interleaved = [slice(rank, BATCH, 4), slice(rank + 2, BATCH, 4)]
    for name, copies in nets.items():
        ways = [("whole", whole, False), ("accumulated", quarters, False), ("recomputed", interleaved, True)]
        for net, (way, parts, recompute) in zip(copies, ways, strict=True):
            if rank == 0:
                start(net)
            build.share({"model": net})
            results[f"{name} {way}"] = train(net, parts, recompute)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Tensor]]]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(on_rank, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", ["whole", "accumulated", "recomputed"])
@pytest.mark.parametrize("name", list(CASES))
def test_codebooks_are_equal_from_the_first_update(ranks: Any, name: str, way: str) -> None:
    first, second = (results[f"{name} {way}"] for results in ranks)
    for step in range(STEPS):
        assert first[step].keys() == second[step].keys() > {"quantizer.codebook"}
        assert [key for key in first[step] if not torch.equal(first[step][key], second[step][key])] == []


@contextmanager
def choices_are_clear() -> Iterator[None]:
    """No vector lies so near the middle between two codes that rounding chooses: after that all codes may differ.

    What is compared are products of vector and code less half the code's square. Behind these lie sums of 4 numbers
    (the encoder), 7 (the products) and up to 128 (the mean that a code is), each off by up to eps / 2 for a number.
    """
    assign = vector_quantizer.assign

    def watched(points: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        exact, of_codes = points.double(), codes.double()
        first, second = (exact @ of_codes.T - of_codes.square().sum(dim=1) / 2).topk(2, dim=1).values.T
        size = exact.norm(dim=1) * of_codes.norm(dim=1).max()
        assert bool((first - second > (4 + 7 + 128) / 2 * torch.finfo(torch.float32).eps * size).all())
        return assign(points, codes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_quantizer, "assign", watched)
        yield


@pytest.mark.parametrize("way", ["whole", "accumulated", "recomputed"])
@pytest.mark.parametrize("name", list(CASES))
def test_statistics_are_those_of_the_whole_batch(ranks: Any, name: str, way: str) -> None:
    """One process on everything; sums in another order differ by rounding."""
    net = fresh(CASES[name], 0)
    start(net)
    before = net.quantizer.codebook.clone()
    with choices_are_clear():
        want = train(net, [slice(0, BATCH)], recompute=False)
    assert not torch.equal(want[0]["quantizer.codebook"], before)
    for got, reference in zip(ranks[0][f"{name} {way}"], want, strict=True):
        for key, value in reference.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


def test_seeds_differ_before_sharing() -> None:
    """Else the tests above would prove nothing."""
    first, second = fresh({}, 0), fresh({}, 100)
    assert not torch.equal(first.quantizer.codebook, second.quantizer.codebook)
