"""The sigmoid loss against a double loop over the pairs of the joint batch, on one, two and three ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from support.processes import in_ranks
from torch import Tensor

from dalle_scale import dist
from dalle_scale.nn.torchvision_compat import import_open_clip
from dalle_scale.stages import clip

SLOTS, DIMENSIONS, EMPTY = 6, 5, (1, 4)
SCALE, BIAS = 7.0, -3.0


def joint() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Leaves (vectors of all slots, scale, bias), caption tokens and weights as the loop scales them. The slots 0 and 5
    share a caption, which stays a wrong one of the other."""
    generator = torch.Generator().manual_seed(3)
    leaves = {name: torch.randn(SLOTS, DIMENSIONS, generator=generator) for name in ("images", "texts")}
    leaves |= {"scale": torch.tensor([SCALE]), "bias": torch.tensor([BIAS])}
    tokens = torch.tensor([0, 1, 2, 3, 4, 0])[:, None].expand(SLOTS, 2)
    weight = torch.full((SLOTS,), SLOTS / (SLOTS - len(EMPTY)))
    weight[list(EMPTY)] = 0
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, tokens, weight


def part_loss(leaves: dict[str, Tensor], tokens: Tensor, weight: Tensor, part: slice) -> clip.Losses:
    """What the rank of these slots computes."""
    images, texts = (F.normalize(leaves[name], dim=1)[part] for name in ("images", "texts"))
    scale, bias = leaves["scale"].squeeze(), leaves["bias"].squeeze()
    return clip.sigmoid_loss(images, texts, scale, bias, tokens[part], weight[part])


def brute_force() -> dict[str, Tensor]:
    """Eq. 1 in loops over the samples that are there, in float64: the loss and its gradients."""
    leaves, _, _ = joint()
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    there = [slot for slot in range(SLOTS) if slot not in EMPTY]
    total = torch.zeros((), dtype=torch.float64)
    for i in there:
        for j in there:
            image, text = exact["images"][i], exact["texts"][j]
            logit = exact["scale"][0] * (image @ text) / (image.norm() * text.norm()) + exact["bias"][0]
            total = total + torch.log(1 + torch.exp(-logit if i == j else logit))
    total = total / len(there)
    total.backward()
    return {"loss": total.detach()} | {name: leaf.grad for name, leaf in exact.items()}


def result_of(rank: int, ranks: int) -> dict[str, Tensor]:
    """Loss and gradients of one rank's slots, averaged over the ranks as DeepSpeed does."""
    leaves, tokens, weight = joint()
    size = SLOTS // ranks
    losses = part_loss(leaves, tokens, weight, slice(rank * size, rank * size + size))
    losses.total.backward()
    result = {name: leaf.grad for name, leaf in leaves.items()}
    result |= {name: term.reshape(1) for name, term in losses.terms.items()}
    return {name: dist.all_reduce(value, "mean") for name, value in result.items()}


def on_rank(rank: int, folder: str) -> None:
    """One of three processes: first all three are ranks, then two of them."""
    torch.set_num_threads(1)
    import_open_clip()  # its collectives keep to the group that is there when they are imported, if there is one
    for ranks in (3, 2):
        if rank < ranks:
            store = f"file://{folder}/store{ranks}"
            torch_dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
            result = result_of(rank, ranks)
            if rank == 0:
                torch.save(result, f"{folder}/{ranks}.pt")
            del result
            dist.leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    """By number of ranks. At two each has one empty slot, at three one rank has none."""
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(on_rank, str(folder), ranks=3)
    many = {ranks: torch.load(folder / f"{ranks}.pt", weights_only=True) for ranks in (2, 3)}
    return {1: result_of(0, 1), **many}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_value_and_gradients_are_those_of_a_double_loop(results, ranks):
    result, want = results[ranks], brute_force()
    assert float(result["loss"]) == pytest.approx(float(want["loss"]), rel=1e-5)
    for name in ("images", "texts", "scale", "bias"):
        torch.testing.assert_close(result[name].double(), want[name], rtol=1e-4, atol=1e-6)
    for name in ("images", "texts"):
        assert not result[name][list(EMPTY)].any() and result[name][0].any(), "an empty slot takes no part"
    assert float(result["logit_scale"]) == pytest.approx(SCALE) and float(result["logit_bias"]) == BIAS


def test_the_loop_has_a_closed_form_for_equal_vectors():
    """n positives and n(n - 1) negatives with the same logit."""
    vectors, count = torch.ones(4, 4) / 2, 4
    tokens = torch.arange(4)[:, None]
    losses = clip.sigmoid_loss(vectors, vectors, torch.tensor(2.0), torch.tensor(-1.0), tokens, torch.ones(4))
    logit = 2.0 - 1.0
    want = math.log1p(math.exp(-logit)) + (count - 1) * math.log1p(math.exp(logit))
    assert losses.total.item() == pytest.approx(want, rel=1e-6)
