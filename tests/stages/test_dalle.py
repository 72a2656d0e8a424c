"""Losses against closed forms, sampling against a plain uncached loop, and what a sample may depend on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_scale.models.transformer.masks import Layout, visible
from dalle_scale.nn.gumbel import gumbel_noise
from dalle_scale.stages.dalle import Stage, truncate
from dalle_scale.types import Batch, Nets, UserError

SMALL = {
    "text_vocab": 11,
    "text_length": 4,
    "image_vocab": 13,
    "grid": 3,
    "image_size": 6,
    "width": 16,
    "layers": 3,
    "heads": 2,
    "conv_kernel": 3,
}


def make(upstream=None, **changes) -> tuple[Stage, Nets]:
    """A stage whose logits spread over a few nats."""
    stage = Stage(Stage.Config(**{**SMALL, **changes}), upstream)
    torch.manual_seed(0)
    nets = stage.nets()
    for parameter in nets["model"].parameters():
        nn.init.normal_(parameter, std=0.3)
    return stage, nets


def make_batch(stage: Stage, count: int = 6) -> Batch:
    c, generator = stage.config, torch.Generator().manual_seed(3)
    text = torch.randint(0, c.text_vocab, (count, c.text_length), generator=generator)
    text[:, -1] = c.text_vocab + c.text_length - 1
    return {
        "text": text,
        "codes": torch.randint(0, c.image_vocab, (count, c.grid**2), generator=generator),
        "seed": torch.randint(0, 1 << 40, (count,), generator=generator),
        "weight": torch.ones(count),
    }


class Brightness:
    """An image tokenizer with parameters: one code for each 2x2 square."""

    vocab, grids, image_size = 13, (3,), 6

    def __init__(self):
        self.gain = nn.Parameter(torch.tensor(1.0))

    def encode(self, images):
        levels = nn.functional.avg_pool2d(images.float().mean(1, keepdim=True) * self.gain, 2)
        return (levels * 13 / 256).long().flatten(1)

    def decode(self, codes):
        return (codes.view(-1, 1, 3, 3) * 19).to(torch.uint8).repeat_interleave(2, 2).repeat_interleave(2, 3)


def nll(logits, targets):
    """Cross entropy by definition, in float64, a mean over positions: [B]."""
    shares = logits.double().exp()
    shares = shares / shares.sum(-1, keepdim=True)
    return -shares.gather(-1, targets[..., None])[..., 0].log().mean(1)


def test_loss_is_an_eighth_of_text_and_seven_of_image():
    stage, nets = make()
    batch = make_batch(stage)
    batch["weight"] = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    losses = stage.loss("model", nets, batch, step=0)
    text_logits, image_logits = nets["model"](batch["text"], batch["codes"])
    text = (nll(text_logits, batch["text"]) * batch["weight"]).mean()
    image = (nll(image_logits, batch["codes"]) * batch["weight"]).mean()
    torch.testing.assert_close(losses.total.double(), text / 8 + image * 7 / 8, rtol=1e-5, atol=0)
    assert losses.terms["text"].item() == pytest.approx(text.item(), rel=1e-5)
    assert losses.terms["image"].item() == pytest.approx(image.item(), rel=1e-5)
    assert torch.equal(losses.terms["loss"], losses.total.detach())


def test_fresh_model_knows_nothing():
    """Cross entropy of fresh weights is that of the uniform distribution; text vocabulary counts the pads."""
    config = Stage.Config(**{**SMALL, "text_vocab": 300, "image_vocab": 200, "width": 64})
    stage = Stage(config)
    torch.manual_seed(0)
    terms = stage.loss("model", stage.nets(), make_batch(stage, 32), step=0).terms
    assert terms["text"].item() == pytest.approx(math.log(304), abs=0.05)
    assert terms["image"].item() == pytest.approx(math.log(200), abs=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_loss_of_a_sample_does_not_depend_on_its_batch(dropout):
    stage, nets = make(caption_dropout=dropout)
    batch = make_batch(stage)
    for row in range(6):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        picked = {**batch, "weight": 6.0 * (torch.arange(6) == row)}
        expected = stage.loss("model", nets, alone, step=0)
        for name, term in stage.loss("model", nets, picked, step=7).terms.items():
            torch.testing.assert_close(term, expected.terms[name], rtol=1e-5, atol=1e-6)


def test_caption_dropout_empties_its_share_and_leaves_the_balance():
    stage, nets = make(caption_dropout=0.3)
    seen = []
    nets["model"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    one = make_batch(stage, 1)
    batch = {key: value.expand(4000, *value.shape[1:]) for key, value in one.items()}
    batch["seed"] = torch.arange(4000) * 977
    with torch.no_grad():
        dropped_terms = stage.loss("model", nets, batch, step=0).terms
        empty = (seen[0] == stage.empty_caption()).all(1)
        assert (seen[0][~empty] == one["text"]).all()
        assert empty.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 4000) ** 0.5)
        nets["model"].eval()
        terms = stage.loss("model", nets, batch, step=0).terms
    assert torch.equal(seen[1], batch["text"]), "no dropout outside of training"
    # all captions are equal here: leaving out the emptied ones and scaling the others keeps the mean
    kept = (1 - empty.float().mean().item()) / 0.7
    assert dropped_terms["text"].item() == pytest.approx(terms["text"].item() * kept, rel=1e-5)


def test_codes_are_encoded_in_the_step_without_gradient():
    tokenizer = Brightness()
    stage, nets = make(tokenizer, encode_in_step=True)
    batch = make_batch(stage)
    images = torch.randint(0, 256, (6, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = {**batch, "codes": tokenizer.encode(images)}
    del batch["codes"]
    losses = stage.loss("model", nets, {**batch, "image": images}, step=0)
    reference = Stage(Stage.Config(**SMALL)).loss("model", nets, stored, step=0)
    assert torch.equal(losses.total, reference.total)
    losses.total.backward()
    assert tokenizer.gain.grad is None


def test_needs():
    stored = Stage(Stage.Config(**SMALL)).inputs
    assert stored.keys == ("text", "codes")
    assert (stored.num_codes, stored.code_vocab, stored.text_vocab, stored.bpe_dropout) == (9, 13, 11, 0.1)
    encoded = Stage(Stage.Config(**SMALL, encode_in_step=True), Brightness()).inputs
    assert encoded.keys == ("image", "text")
    assert (encoded.image_size, encoded.augment) == (6, "transformer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.width: 16 does not divide by model.heads 3"),
        ({"conv_kernel": 4}, "model.conv_kernel: 4 is even"),
        ({"attention": ()}, "model.attention: no kind given"),
        ({"image_vocab": 14}, "model.image_vocab: 14, but the image tokenizer has 13; set model.image_vocab=13"),
        ({"grid": 4}, "model.grid: 4, but the image tokenizer has 3"),
        ({"image_size": 8, "encode_in_step": True}, "model.image_size: 8, but the image tokenizer has 6"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        Stage(Stage.Config(**{**SMALL, **changes}), Brightness())


def test_encoding_in_the_step_wants_a_tokenizer():
    with pytest.raises(UserError, match="set tokenizer"):
        _ = Stage(Stage.Config(**SMALL, encode_in_step=True)).inputs


def test_attention_kinds():
    kinds = make(attention=("full", "row"))[1]["model"].kinds
    assert kinds == ("full", "row", "full")
    assert make(layers=5)[1]["model"].kinds == ("row", "column", "row", "row", "conv")


def draw_plainly(stage, nets, text, seeds, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, prime=None):
    """`Stage.sample` by definition: image by image, the whole sequence again for each code, truncation by sorting."""
    c, images = stage.config, []
    empty = torch.arange(c.text_vocab, c.text_vocab + c.text_length)[None]
    for row in range(len(text)):
        codes = torch.zeros(1, c.grid**2, dtype=torch.int64)
        for index in range(c.grid**2):
            if prime is not None and index < prime.shape[1]:
                codes[0, index] = prime[row, index]
                continue
            logits = nets["model"](text[row : row + 1], codes)[1][0, index]
            if guidance != 1:
                unguided = nets["model"](empty, codes)[1][0, index]
                logits = (1 - guidance) * unguided + guidance * logits
            order = (logits / temperature).argsort(descending=True).tolist()
            order = order[: top_k or None]
            shares = (logits[order] / temperature).softmax(0)
            count = next(n for n in range(1, len(order) + 1) if shares[:n].sum() >= top_p - 1e-6)
            noise = gumbel_noise(seeds[row : row + 1], index, c.image_vocab)[0]
            codes[0, index] = max(order[:count], key=lambda code: logits[code] / temperature + noise[code])
        images.append(codes)
    return torch.cat(images)


@pytest.mark.parametrize("attention", ["paper", ("full",), ("row",), ("column",), ("conv",)])
@pytest.mark.parametrize(("guidance", "primed"), itertools.product([1.0, 2.5], [0, 4]))
@torch.no_grad()
def test_drawing_equals_the_plain_loop(attention, guidance, primed):
    stage, nets = make(attention=attention)
    batch = make_batch(stage, 4)
    text, seeds = batch["text"][[0, 1, 0, 2]], torch.tensor([5, 5, 6, -7])
    options = {"guidance": guidance, "prime": batch["codes"][:, :primed] if primed else None}
    for more in ({}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}):
        sampled = stage.sample(nets, text, seeds, **options, **more)
        assert torch.equal(sampled, draw_plainly(stage, nets, text, seeds, **options, **more))


def test_without_captions():
    """Codes alone: loss and samples by definition, and no parameter for text."""
    stage, nets = make(text_length=0)
    assert stage.inputs.keys == ("codes",)
    assert not any("text" in name for name, _ in nets["model"].named_parameters())
    codes, seeds = make_batch(make()[0], 4)["codes"], torch.arange(4) + 9
    losses = stage.loss("model", nets, {"codes": codes, "seed": seeds, "weight": torch.ones(4)}, 0)
    nothing = torch.empty(4, 0, dtype=torch.int64)
    logits = nets["model"](nothing, codes)[1]
    expected = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(losses.total, expected)
    sampled = stage.sample(nets, nothing, seeds, temperature=0.8)
    assert torch.equal(sampled, draw_plainly(stage, nets, nothing, seeds, temperature=0.8))
    assert torch.equal(sampled[2:3], stage.sample(nets, nothing[:1], seeds[2:3], temperature=0.8))
    with pytest.raises(UserError, match=r"guidance: 2\.0, but this model has no captions"):
        stage.sample(nets, nothing, seeds, guidance=2.0)


@torch.no_grad()
def test_larger_images_through_a_sliding_window():
    """At the grid's own size it is `sample`; beyond, each code follows the window around it, and no other code."""
    stage, nets = make(attention=("full",))
    text, seeds = make_batch(stage, 2)["text"], torch.tensor([3, 4])
    options = {"temperature": 0.9, "top_k": 9, "guidance": 1.5}
    same = stage.sample_larger(nets, text, seeds, 3, 3, **options)
    assert torch.equal(same.flatten(1), stage.sample(nets, text, seeds, **options))
    codes = stage.sample_larger(nets, text, seeds, 4, 6, temperature=0.9)
    assert codes.shape == (2, 4, 6)
    for y, x, top, left in [(0, 0, 0, 0), (1, 3, 0, 2), (2, 2, 1, 1), (3, 5, 1, 3)]:
        window = codes[:, top : top + 3, left : left + 3].flatten(1)
        logits = nets["model"](text, window)[1][:, (y - top) * 3 + x - left] / 0.9
        expected = (logits + gumbel_noise(seeds, y * 6 + x, 13)).argmax(-1)
        assert torch.equal(codes[:, y, x], expected)
    with pytest.raises(UserError, match="2 x 6 is smaller than the model's 3 x 3 codes"):
        stage.sample_larger(nets, text, seeds, 2, 6)


def test_same_seed_same_image_at_any_batch_size():
    stage, nets = make()
    text, seeds = make_batch(stage, 7)["text"], torch.arange(7) + 100
    together = stage.sample(nets, text, seeds, guidance=2.0, top_p=0.9)
    alone = [stage.sample(nets, text[[i]], seeds[[i]], guidance=2.0, top_p=0.9) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, stage.sample(nets, text, seeds + 1, guidance=2.0, top_p=0.9))


def test_drawn_codes_follow_the_softmax():
    """One code, 20,000 seeds: Pearson's chi-square against the model's own probabilities."""
    stage, nets = make(grid=1, image_vocab=5)
    text = make_batch(stage, 1)["text"]
    codes = stage.sample(nets, text.expand(20_000, -1), torch.arange(20_000), temperature=1.7)
    with torch.no_grad():
        logits = nets["model"](text, codes[:1])[1][0, 0]
    expected = (logits / 1.7).softmax(0) * 20_000
    counts = torch.bincount(codes.flatten(), minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 99.9th percentile at 4 degrees of freedom


def test_primed_codes_stay_and_steer():
    stage, nets = make()
    with torch.no_grad():
        nets["model"].image_code.weight.mul_(10)  # so that codes weigh more than their positions
    text, seeds = make_batch(stage, 8)["text"], torch.ones(8, dtype=torch.int64)
    prime = make_batch(stage, 8)["codes"][:, :3]
    codes = stage.sample(nets, text[:1].expand(8, -1), seeds, prime=prime)
    assert torch.equal(codes[:, :3], prime)
    assert len(codes[:, 3:].unique(dim=0)) > 1
    whole = make_batch(stage, 8)["codes"]
    assert torch.equal(stage.sample(nets, text, seeds, prime=whole), whole)


def test_codes_are_in_range_however_hot():
    stage, nets = make()
    codes = stage.sample(nets, make_batch(stage, 64)["text"], torch.arange(64), temperature=100.0)
    assert codes.shape == (64, 9) and codes.dtype == torch.int64
    assert codes.min() == 0 and codes.max() == 12


def test_sampling_leaves_its_inputs_alone():
    stage, nets = make()
    text, seeds = make_batch(stage, 2)["text"], torch.arange(2)
    before = text.clone()
    stage.sample(nets, text, seeds, guidance=3.0)
    assert torch.equal(text, before)


def test_truncation_keeps_exactly_what_it_says():
    logits = torch.tensor([[0.5, 0.1, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]]).log()
    for top_k in range(1, 5):
        assert truncate(logits, top_k=top_k).isfinite().sum(1).tolist() == [top_k, top_k], "ties must not add codes"
    assert truncate(logits, top_p=0.6)[0].isfinite().tolist() == [True, False, True, False]
    assert truncate(logits, top_p=0.8).isfinite().sum(1).tolist() == [3, 1]
    assert truncate(logits, top_p=1e-9).isfinite().sum(1).tolist() == [1, 1]
    assert truncate(logits, top_k=2, top_p=0.6).isfinite().sum(1).tolist() == [1, 1], "top-p of what top-k left"
    assert torch.equal(truncate(logits), logits)
    assert torch.equal(truncate(logits, top_k=99), logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"guidance": -1.0},
    ],
)
def test_parameters_out_of_range(options):
    stage, nets = make()
    with pytest.raises(UserError, match=f"^options: {next(iter(options))} = "):
        stage.sample(nets, make_batch(stage, 1)["text"], torch.zeros(1, dtype=torch.int64), **options)


def test_preview():
    stage, nets = make(Brightness())
    batch = make_batch(stage, 10)
    images = stage.preview(nets, batch)["samples"]
    assert images.shape == (8, 1, 6, 6) and images.dtype == torch.uint8
    assert torch.equal(images, stage.preview(nets, batch)["samples"])
    assert Stage(stage.config).preview(nets, batch) == {}


def test_flops_are_the_counted_ones():
    """Matrix products as torch counts them, and attention over the visible pairs only."""
    stage, nets = make()
    batch = make_batch(stage, 2)
    with FlopCounterMode(display=False) as counter:
        stage.loss("model", nets, batch, step=0).total.backward()
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in counts.items() if name in ("aten.mm", "aten.addmm"))
    layout = Layout(6, 3, 3)
    pairs = sum(int(visible(kind, layout).sum()) for kind in ("row", "column", "conv"))
    attention = 3 * 2 * 2 * 16 * pairs  # forward and backward, scores and mixing, multiply and add
    assert stage.flops_per_sample() == products / 2 + attention
