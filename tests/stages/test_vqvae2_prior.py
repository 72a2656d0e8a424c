"""Loss against a closed form, sampling against a plain uncached loop and against exact probabilities, and config."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from torch import Tensor, nn

from dalle_scale import config
from dalle_scale.stages.vqvae2_prior import Stage
from dalle_scale.types import Batch, Nets, UserError

SMALL = {
    "grids": (2, 4), "level": 0, "vocab": 7, "width": 16, "residual_width": 12, "layers": 2, "kernel": 3,
    "attention_blocks": 1, "heads": 2, "output_layers": 1, "conditioning_layers": 1, "dropout": 0.0,
}  # fmt: skip
CAPTIONS = {"text_vocab": 11, "text_length": 4}
BOTTOM = {"level": 1, "attention_blocks": 0, **CAPTIONS}


def make(upstream=None, spread=0.6, **changes) -> tuple[Stage, Nets]:
    """A stage whose logits spread over a few nats; with `spread` 0, with the weights that training starts from."""
    stage = Stage(Stage.Config(**{**SMALL, **changes}), upstream)
    torch.manual_seed(0)
    nets = stage.nets()
    for parameter in nets["model"].parameters() if spread else ():
        nn.init.normal_(parameter, std=spread)
    return stage, nets


def make_batch(stage: Stage, count: int = 6) -> Batch:
    inputs, generator = stage.inputs, torch.Generator().manual_seed(3)
    batch = {
        "codes": torch.randint(inputs.code_vocab, (count, inputs.num_codes), generator=generator),
        "seed": torch.randint(0, 1 << 40, (count,), generator=generator),
        "weight": torch.ones(count),
    }
    if inputs.text_length:
        batch["text"] = torch.randint(inputs.text_vocab, (count, inputs.text_length), generator=generator)
        batch["text"][:, -1] = inputs.text_vocab + inputs.text_length - 1
    return batch


@torch.no_grad()
def uncached(stage: Stage, nets: Nets, seeds: Tensor, upper=None, text=None, temperature=1.0) -> tuple[Tensor, Tensor]:
    """A full forward pass for each code: (codes, logits)."""
    cells = stage.config.grid**2
    codes, kept = torch.zeros(len(seeds), cells, dtype=torch.int64), []
    for index in range(cells):
        kept.append(nets["model"](codes, upper, text)[:, index])
        row, column = divmod(index, stage.config.grid)
        codes[:, index] = (kept[-1] / temperature + stage.noise(seeds, row)[:, column]).argmax(-1)
    return codes, torch.stack(kept, dim=1)


class Mosaic:
    """An image tokenizer of two levels; its images show the codes."""

    vocab, grids, image_size = 7, (2, 4), 4

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        top, bottom = codes[:, :4].view(-1, 1, 2, 2), codes[:, 4:].view(-1, 1, 4, 4)
        top = top.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return torch.cat([top, bottom, bottom], dim=1).to(torch.uint8)


@pytest.mark.parametrize("changes", [{}, BOTTOM], ids=["top", "bottom"])
def test_loss_in_closed_form(changes):
    stage, nets = make(**changes)
    batch = make_batch(stage, 2)
    batch["weight"] = torch.tensor([0.5, 1.5])
    losses = stage.loss("model", nets, batch, step=0)
    split = slice(0, 4) if stage.config.level == 0 else slice(4, 20)
    codes, upper = batch["codes"][:, split], batch["codes"][:, :4] if stage.config.level else None
    with torch.no_grad():
        chances = nets["model"](codes, upper, batch.get("text")).double().softmax(-1)
    per_sample = [
        -sum(math.log(chances[row, p, code]) for p, code in enumerate(codes[row])) / len(codes[row]) for row in range(2)
    ]
    want = (0.5 * per_sample[0] + 1.5 * per_sample[1]) / 2
    assert losses.total.item() == pytest.approx(want, rel=1e-5)
    assert losses.terms["nll"].item() == pytest.approx(want, rel=1e-5)
    assert losses.terms["bits_per_code"].item() == pytest.approx(want / math.log(2), rel=1e-5)


def test_starts_near_a_uniform_guess():
    stage, nets = make(spread=0)
    nll = stage.loss("model", nets, make_batch(stage, 64), step=0).total.item()
    assert math.log(7) - 0.1 < nll < math.log(7) + 1.0


def test_a_level_ignores_the_levels_below():
    stage, nets = make()
    batch = make_batch(stage)
    want = stage.loss("model", nets, batch, step=0).total
    batch["codes"][:, 4:] = 0
    assert torch.equal(stage.loss("model", nets, batch, step=0).total, want)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("changes", [{}, BOTTOM, {**BOTTOM, "attention_blocks": 2, "grids": (2, 8)}])
def test_cached_and_uncached_draw_the_same_codes(changes, temperature):
    stage, nets = make(**changes)
    seeds, batch = torch.arange(40, 45), make_batch(stage, 5)
    upper, _ = stage.levels(batch["codes"])
    want, logits = uncached(stage, nets, seeds, upper, batch.get("text"), temperature)
    got = stage.sample(nets, seeds, upper, batch.get("text"), temperature=temperature)
    assert torch.equal(got, want) and len(want.unique()) > 3
    assert logits[:, 1:].std(dim=0).mean() > 0.3, "codes that do not depend on each other prove nothing"


def test_a_sample_does_not_depend_on_its_batch():
    stage, nets = make(**BOTTOM)
    batch, seeds = make_batch(stage, 5), torch.arange(5)
    upper, _ = stage.levels(batch["codes"])
    together = stage.sample(nets, seeds, upper, batch["text"])
    alone = [stage.sample(nets, seeds[i : i + 1], upper[i : i + 1], batch["text"][i : i + 1]) for i in (3, 0)]
    assert torch.equal(torch.cat(alone), together[[3, 0]])
    assert not torch.equal(stage.sample(nets, seeds + 5, upper, batch["text"]), together)


def test_noise_differs_between_rows_and_levels():
    top, bottom = make()[0], make(**BOTTOM)[0]
    seeds = torch.tensor([3, 4])
    squares = [top.noise(seeds, row)[:, :2] for row in range(2)] + [bottom.noise(seeds, row)[:, :2] for row in range(4)]
    for one, other in itertools.combinations(squares, 2):
        assert not torch.any(one == other)
    assert torch.equal(top.noise(seeds[1:], 1), top.noise(seeds, 1)[1:])


def test_draws_have_the_probabilities_of_the_model():
    """All 2^4 squares of two codes against 4000 samples: chi-square of 15 degrees of freedom."""
    stage, nets = make(vocab=2, grids=(2,))
    squares = torch.tensor(list(itertools.product(range(2), repeat=4)))
    with torch.no_grad():
        log_chance = nets["model"](squares).log_softmax(-1).gather(-1, squares[..., None]).sum(dim=(1, 2))
    want = 4000 * log_chance.double().exp()
    assert want.sum().item() == pytest.approx(4000) and want.max() > 2 * want.median()
    sampled = stage.sample(nets, torch.arange(4000)) @ torch.tensor([8, 4, 2, 1])
    counts = torch.bincount(sampled, minlength=16)
    assert ((counts - want) ** 2 / want).sum() < 37.7  # exceeded once in a thousand


def test_temperature():
    stage, nets = make()
    seeds = torch.arange(8)
    cold = stage.sample(nets, seeds, temperature=1e-4)
    assert torch.equal(cold, cold[:1].expand_as(cold))
    assert len(stage.sample(nets, seeds).unique(dim=0)) > 1
    with pytest.raises(UserError, match="temperature = 0"):
        stage.sample(nets, seeds, temperature=0)


def test_learns_by_heart():
    """Four images with captions, and top codes that say nothing of the bottom: bits go toward nothing."""
    stage, nets = make(spread=0, **BOTTOM)
    batch = make_batch(stage, 4)
    optimizer = torch.optim.AdamW(nets["model"].parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        total = stage.loss("model", nets, batch, step).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[0] > 1.7 and losses[-1] < 0.1
    upper, codes = stage.levels(batch["codes"])
    sampled = stage.sample(nets, torch.arange(4), upper, batch["text"], temperature=0.1)
    assert (sampled == codes).float().mean() > 0.9


def test_dropout_is_of_training_only_and_of_the_update():
    stage, nets = make(dropout=0.3)
    batch = make_batch(stage)
    first, other = (stage.loss("model", nets, batch, step).total for step in (0, 1))
    assert not torch.equal(first, other)
    nets["model"].eval()
    assert torch.equal(*(stage.loss("model", nets, batch, step).total for step in (0, 1)))


def test_preview_draws_the_finest_level_anew():
    stage, nets = make(Mosaic(), **BOTTOM)
    batch = make_batch(stage, 3)
    images = stage.preview(nets, batch)["samples"]
    assert images.shape == (3, 3, 8, 4) and images.dtype == torch.uint8
    above, below = images[:, :, :4], images[:, :, 4:]
    assert torch.equal(above, Mosaic().decode(batch["codes"]))
    assert torch.equal(above[:, 0], below[:, 0]) and not torch.equal(above[:, 1], below[:, 1])
    assert torch.equal(below, stage.preview(nets, batch)["samples"][:, :, 4:])
    assert make(Mosaic())[0].preview({}, batch) == {} and make()[0].preview({}, batch) == {}


def test_an_image_tokenizer_that_does_not_fit():
    with pytest.raises(UserError, match=r"model\.vocab: 8, but the image tokenizer has 7"):
        make(Mosaic(), vocab=8)
    with pytest.raises(UserError, match=r"model\.grids: \(2, 8\), but the image tokenizer has \(2, 4\)"):
        make(Mosaic(), grids=(2, 8))


def test_an_image_tokenizer_of_one_level():
    tokenizer = types.SimpleNamespace(vocab=7, grids=(4,), image_size=4, decode=lambda codes: codes.view(-1, 1, 4, 4))
    stage, nets = make(tokenizer, grids=(4,))
    assert stage.preview(nets, make_batch(stage, 2))["samples"].shape == (2, 1, 8, 4)
    with pytest.raises(UserError, match=r"model\.grids: \(2, 4\), but the image tokenizer has \(4,\)"):
        make(tokenizer)


def test_needs():
    inputs = make(**BOTTOM, bpe_dropout=0.1)[0].inputs
    assert (inputs.num_codes, inputs.code_vocab, inputs.text_length, inputs.text_vocab) == (20, 7, 4, 11)
    assert inputs.bpe_dropout == 0.1 and make()[0].inputs.keys == ("codes",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": (4, 6)}, "each a multiple of the one before"),
        ({"grids": (4, 4)}, "must grow from level to level"),
        ({"level": 2}, "is not below the number of grids, 2"),
        ({"kernel": 4}, "must be odd; take 5"),
        ({"attention_blocks": 3}, "must divide layers 2"),
        ({"heads": 3}, "must divide width 16"),
        ({"text_length": 4}, "set text_length and text_vocab together"),
    ],
)
def test_wrong_config_is_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        config.parse(Stage.Config, {**SMALL, **changes}, where="model")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flops_of_one_convolution_of_many():
    """Two more layers cost two more pairs of convolutions over windows of (kernel // 2 + 1) x kernel."""
    few, more = (make(attention_blocks=0, layers=layers)[0].flops_per_sample() for layers in (2, 4))
    pair = 2 * 4 * (2 * 3) * (16 * 12 + 12 * 32)  # two operations a product, four pixels
    assert more - few == pytest.approx(3 * 2 * pair)
