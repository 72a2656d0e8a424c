"""The clip stage: its loss against open_clip and against brute force, on one process and on two."""

from __future__ import annotations

import importlib
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dalle_scale import config as configs
from dalle_scale import dist
from dalle_scale.nn.torchvision_compat import import_open_clip
from dalle_scale.stages import clip
from dalle_scale.types import Batch, Nets, UserError

VOCAB, LENGTH, SIDE = 50, 6, 16
SIZES = {
    "image_size": SIDE,
    "patch": 8,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "embed_dim": 16,
    "text_width": 24,
    "text_layers": 2,
    "text_heads": 2,
    "text_vocab": VOCAB,
    "text_length": LENGTH,
}


EPS = torch.finfo(torch.float32).eps


def build(**changes: object) -> tuple[clip.Stage, Nets]:
    """A small model with fresh weights, the same each time."""
    stage = clip.Stage(configs.parse(clip.Stage.Config, SIZES | changes, "model"))
    torch.manual_seed(0)
    return stage, stage.nets()


def make_batch(count: int, seed: int = 0) -> Batch:
    """Noise images with captions of 1 .. LENGTH tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCAB, (count, LENGTH), generator=generator)
    pads = VOCAB + torch.arange(LENGTH).expand(count, -1)
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=generator).to(torch.uint8)
    return {"image": images, "text": torch.where(pads - VOCAB < lengths, text, pads), "weight": torch.ones(count)}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit vectors that take a gradient."""
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=-1).requires_grad_()


def test_loss_is_open_clips():
    stage, nets = build()
    batch = make_batch(5)
    pixels = batch["image"].float() / 127.5 - 1
    expected = import_open_clip().ClipLoss()(*nets["model"](pixels, batch["text"]))
    losses = stage.loss("model", nets, batch, 0)
    torch.testing.assert_close(losses.total, expected)
    assert torch.equal(losses.terms["loss"], losses.total.detach())
    assert float(losses.terms["logit_scale"]) == pytest.approx(1 / 0.07)


def test_siglip_loss_is_open_clips():
    stage, nets = build(loss="siglip")
    batch = make_batch(5)
    images, texts, scale, bias = nets["model"](batch["image"].float() / 127.5 - 1, batch["text"])
    expected = importlib.import_module("open_clip.loss").SigLipLoss()(images, texts, scale, bias)
    losses = stage.loss("model", nets, batch, 0)
    torch.testing.assert_close(losses.total, expected)
    parameters = list(nets["model"].parameters())
    pairs = zip(*(torch.autograd.grad(total, parameters) for total in (losses.total, expected)), strict=True)
    for got, want in pairs:  # some hundred roundings, one after the other
        assert float((got - want).norm()) <= 100 * EPS * float(want.norm())
    assert torch.equal(losses.terms["loss"], losses.total.detach())
    assert float(losses.terms["logit_scale"]) == pytest.approx(10) and float(losses.terms["logit_bias"]) == -10
    assert all(term.shape == () for term in losses.terms.values())


def test_siglip_starts_near_the_prior_of_a_pair():
    """Sec. 3.2 of its paper: with unrelated vectors and the starting bias, the loss is about that of the positives."""
    losses = build(loss="siglip")[0].loss("model", build(loss="siglip")[1], make_batch(8), 0)
    assert 0 < losses.total.item() < 25
    without = build(loss="siglip", logit_bias=0.0)
    assert without[0].loss("model", without[1], make_batch(64), 0).total.item() > 2 * losses.total.item()


def test_the_bias_exists_for_siglip_only():
    """Weights of a softmax model from before there was a choice fit as they are."""
    _, softmax = build()
    _, siglip = build(loss="siglip")
    before, now = softmax["model"].state_dict(), siglip["model"].state_dict()
    assert set(now) - set(before) == {"logit_bias"} and set(before) < set(now)
    assert min(parameter.ndim for parameter in siglip["model"].parameters()) == 1
    earlier = {**SIZES, "augment": "none", "bpe_dropout": 0.0, "logit_scale": 1 / 0.07, "logit_scale_max": 100.0}
    stage = clip.Stage(configs.parse(clip.Stage.Config, earlier, "model"))
    assert stage.nets()["model"].load_state_dict(before).missing_keys == []


def test_empty_slots_are_neither_positives_nor_negatives():
    """Against the mean of -log softmax over the samples that are there, in plain loops."""
    images, texts = unit(6, 8, seed=1), unit(6, 8, seed=2)
    tokens = torch.arange(6)[:, None].expand(6, LENGTH)
    there = [0, 2, 3]
    weight = torch.zeros(6).index_fill(0, torch.tensor(there), 2.0)  # 6 slots / 3 samples, as the loop scales it
    losses = clip.contrastive_loss(images, texts, torch.tensor(7.0), tokens, weight)

    def nats(rows: torch.Tensor, columns: torch.Tensor) -> float:
        total = 0.0
        for i in there:
            scores = [7.0 * float(rows[i].detach() @ columns[j].detach()) for j in there]
            total += math.log(sum(math.exp(score) for score in scores)) - scores[there.index(i)]
        return total / len(there)

    assert losses.total.item() == pytest.approx((nats(images, texts) + nats(texts, images)) / 2, abs=1e-5)
    losses.total.backward()
    for features in (images, texts):
        assert features.grad is not None and features.grad.isfinite().all()
        assert [bool(row.any()) for row in features.grad] == [True, False, True, True, False, False]


def test_a_batch_of_empty_slots_has_no_loss():
    images, texts = unit(3, 8), unit(3, 8, seed=1)
    losses = clip.contrastive_loss(images, texts, torch.tensor(7.0), torch.zeros(3, 2).long(), torch.zeros(3))
    losses.total.backward()
    assert losses.total.item() == 0 and not images.grad.any()
    images, texts, bias = unit(3, 8), unit(3, 8, seed=1), torch.tensor(-10.0, requires_grad=True)
    losses = clip.sigmoid_loss(images, texts, torch.tensor(7.0), bias, torch.zeros(3, 2).long(), torch.zeros(3))
    losses.total.backward()
    assert losses.total.item() == 0 and not images.grad.any() and bias.grad == 0


def test_accuracy_counts_equal_captions_as_right():
    """Images 0 and 1 share a caption. Image 2 lies nearest to caption 3; caption 2 nearest to image 2."""
    corner = torch.eye(4)
    images = F.normalize(torch.stack([corner[0], corner[0], corner[2] + 2 * corner[3], corner[3]]), dim=1)
    texts = torch.stack([corner[0], corner[0], corner[2], corner[3]])
    tokens = torch.tensor([[5, 6], [5, 6], [7, 8], [7, 9]])
    terms = clip.contrastive_loss(images, texts, torch.tensor(10.0), tokens, torch.ones(4)).terms
    assert float(terms["accuracy_image_to_text"]) == 0.75
    assert float(terms["accuracy_text_to_image"]) == 1.0
    collapsed = torch.ones(4, 4) / 2
    terms = clip.contrastive_loss(collapsed, collapsed, torch.tensor(10.0), tokens, torch.ones(4)).terms
    assert float(terms["accuracy_image_to_text"]) == 0.5, "equal vectors are no skill"


@pytest.mark.parametrize(
    ("scale", "gradient", "value", "passed"),
    [(50.0, -1.0, 50.0, -1.0), (50.0, 1.0, 50.0, 1.0), (101.0, 1.0, 100.0, 1.0), (101.0, -1.0, 100.0, 0.0)],
)
def test_logit_scale_is_capped_and_comes_back(scale, gradient, value, passed):
    """Descent goes against the gradient: a negative one would raise the scale further above its cap."""
    parameter = torch.tensor(scale, requires_grad=True)
    capped = clip._CappedScale.apply(parameter, 100.0)
    (capped * gradient).backward()
    assert capped.item() == value and float(parameter.grad) == passed


def test_logit_scale_does_not_run_away():
    """A loss that always wants more leaves it at its cap, and one that wants less gets it down at once."""
    log_scale = torch.tensor(math.log(95.0), requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=0.01)
    for step in range(250):
        capped = clip._CappedScale.apply(log_scale.exp(), 100.0)
        optimizer.zero_grad()
        (capped * (-1 if step < 200 else 1)).backward()
        optimizer.step()
        assert float(log_scale.detach()) < math.log(100.0) + 0.1
    assert float(log_scale.detach()) < math.log(90.0)


def test_every_word_counts_whatever_the_length():
    """Also where a caption fills all places and its highest token comes first: open_clip's own pooling would stop
    there, and attention is causal."""
    stage, nets = build()
    nets["model"].eval()
    full = torch.tensor([[49, 1, 2, 3, 4, 5]])
    short = torch.tensor([[49, 1, VOCAB + 2, VOCAB + 3, VOCAB + 4, VOCAB + 5]])
    for caption, words in ((full, 6), (short, 2)):
        for position in range(words):
            other = caption.clone()
            other[0, position] = 30
            change = (stage.text_features(nets, caption) - stage.text_features(nets, other)).abs().max()
            assert change > 1e-4, f"word {position} of {words} is not seen"


def test_scores_are_open_clips_cosines():
    stage, nets = build()
    batch = make_batch(4)
    model = nets["model"].eval()
    with torch.no_grad():
        scores = stage.scores(nets, batch["image"], batch["text"])
        images = model.encode_image(batch["image"].float() / 127.5 - 1)
        expected = F.cosine_similarity(images, model.encode_text(batch["text"]))
        larger = batch["image"].repeat_interleave(3, 2).repeat_interleave(3, 3)
        resized = stage.scores(nets, larger, batch["text"])
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (4,) and resized.shape == (4,)
    assert (resized - scores).abs().max() < 0.2 * (scores.max() - scores.min()), "only the size differs"


def test_preview_shows_the_similarities():
    stage, nets = build()
    batch = make_batch(3)
    with torch.no_grad():
        image = stage.preview(nets, batch)["similarity"]
        scores = stage.scores(nets, batch["image"], batch["text"])
    assert image.shape == (1, 3, 24, 24) and image.dtype == torch.uint8
    torch.testing.assert_close(image[0, 0, 4::8, 4::8].diag() / 127.5 - 1, scores, atol=1 / 127, rtol=0)


def test_flops_against_torchs_counter():
    stage, nets = build(width=64, text_width=64, layers=3)
    batch = make_batch(1)
    with FlopCounterMode(display=False) as counter:
        images, texts, scale = nets["model"](batch["image"].float(), batch["text"])
        (images.sum() + texts.sum() + scale).backward()
    assert stage.flops_per_sample() == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_roles_of_parameters():
    _, nets = build()
    marked = {name for name, parameter in nets["model"].named_parameters() if getattr(parameter, "is_embedding", False)}
    assert marked == {"text.token_embedding.weight", "text.positional_embedding", "visual.positional_embedding"}


@pytest.mark.parametrize("loss", ["softmax", "siglip"])
def test_it_learns(loss):
    stage, nets = build(loss=loss)
    batch = make_batch(8)
    optimizer = torch.optim.AdamW(nets["model"].parameters(), lr=2e-3)
    for step in range(40):
        losses = stage.loss("model", nets, batch, step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert float(losses.terms["accuracy_image_to_text"]) == float(losses.terms["accuracy_text_to_image"]) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "image_size 16 does not divide by patch 5"),
        ({"heads": 3}, "width 32 does not divide by heads 3"),
        ({"text_heads": 5}, "text_width 24 does not divide by text_heads 5"),
        ({"logit_scale": 200}, "logit_scale 200.0 is above logit_scale_max 100.0"),
        ({"loss": "siglip", "logit_scale_max": 9}, "logit_scale 10.0 is above logit_scale_max 9.0"),
        ({"logit_bias": -10}, "logit_bias -10.0: the softmax loss has none; set loss: siglip"),
    ],
)
def test_bad_sizes_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.parse(clip.Stage.Config, SIZES | change, "model")
    assert "\n" not in str(caught.value)


def joint_batch() -> Batch:
    """Eight slots, two of them empty, on both ranks' sides unequally; weights as the loop scales them."""
    batch = make_batch(8, seed=5)
    batch["text"][6] = batch["text"][1]  # the same caption on both ranks
    batch["weight"] = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0]) * 8 / 6
    return batch


def one_rank(rank: int, folder: str) -> None:
    """Rank `rank` of two: losses of its half of the batch, gradients averaged as DeepSpeed does, written by rank 0."""
    torch.set_num_threads(1)
    limits = {"timeout": timedelta(seconds=120), "rank": rank, "world_size": 2}
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", **limits)
    for loss in ("softmax", "siglip"):
        stage, nets = build(loss=loss)
        batch = {key: value[rank * 4 : rank * 4 + 4] for key, value in joint_batch().items()}
        losses = stage.loss("model", nets, batch, 0)
        losses.total.backward()
        result = {name: parameter.grad for name, parameter in nets["model"].named_parameters()}
        result |= {f"term {name}": value.clone() for name, value in losses.terms.items()}
        for value in result.values():
            torch_dist.all_reduce(value)
            value /= 2
        if rank == 0:
            torch.save(result, Path(folder) / f"{loss}.pt")
        del losses, result  # the graph holds the process group
    dist.leave()


def test_two_ranks_give_the_loss_and_gradient_of_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    for loss in ("softmax", "siglip"):
        result = torch.load(tmp_path / f"{loss}.pt", weights_only=True)
        stage, nets = build(loss=loss)
        losses = stage.loss("model", nets, joint_batch(), 0)
        losses.total.backward()
        for name, value in losses.terms.items():
            torch.testing.assert_close(result[f"term {name}"], value, msg=f"{loss} {name}: {result[f'term {name}']}")
        for name, parameter in nets["model"].named_parameters():
            torch.testing.assert_close(result[name], parameter.grad, rtol=1e-3, atol=1e-5)
