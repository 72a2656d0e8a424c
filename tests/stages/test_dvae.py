"""The dVAE stage: loss, invariances, k-means start, evaluation, tokenizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.batches import assert_psnr, assert_usage, batch_of, rows, same_codes, same_images
from torch import Tensor
from torch.nn import functional as F

from dalle_scale import config as run_config
from dalle_scale.checkpoint import export
from dalle_scale.nn.gumbel import gumbel_noise
from dalle_scale.nn.likelihoods import phi
from dalle_scale.stages.dvae import DVAE, Stage
from dalle_scale.types import ImageTokenizer, UserError

TINY = {"image_size": 16, "downsampling": 4, "vocab": 32, "n_hid": 8, "multipliers": (1, 1, 2), "n_init": 8}
PATCH = {"stem": "patch", "image_size": 16, "downsampling": 4, "vocab": 32, "n_hid": 48, "n_init": 48}
KMEANS = {**PATCH, "multipliers": (1, 2), "init": "kmeans", "init_samples": 64}
SMALLEST = {"image_size": 8, "downsampling": 2, "vocab": 4, "n_hid": 4, "multipliers": (1, 1), "n_init": 4}


def make(**values: Any) -> tuple[Stage, DVAE]:
    """Stage and model with seeded weights."""
    torch.manual_seed(0)
    stage = Stage(run_config.parse(Stage.Config, values, where="test"))
    model = stage.nets()["model"]
    assert isinstance(model, DVAE)
    return stage, model


def shapes(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Rectangles of random place and colour on a plain background: uint8 [count, 3, size, size], channels last."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(256, (count, 2, 3), generator=generator)
    left, top = torch.randint(size - 4, (2, count), generator=generator)
    width, height = torch.randint(3, 8, (2, count), generator=generator)
    x = torch.arange(size)
    across = (x >= left[:, None]) & (x < (left + width)[:, None])
    down = (x >= top[:, None]) & (x < (top + height)[:, None])
    inside = (across[:, None, :] & down[:, :, None])[:, None]
    images = torch.where(inside, colours[:, 0, :, None, None], colours[:, 1, :, None, None])
    return images.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def test_paper_defaults() -> None:
    stage = Stage(Stage.Config())
    assert stage.inputs.image_size == 256 and stage.inputs.augment == "dvae"
    assert stage.config.grid == 32 and stage.config.vocab == 8192
    with torch.device("meta"):
        model = stage.nets()["model"]
    assert round(sum(p.numel() for p in model.encoder.parameters()) / 1e6, 2) == 53.79
    assert round(sum(p.numel() for p in model.decoder.parameters()) / 1e6, 2) == 43.83
    assert [stage.tau(step) for step in (0, 75_000, 150_000, 200_000)] == [1, 0.53125, 0.0625, 0.0625]
    assert [stage.beta(step) for step in (0, 5_000, 10**6)] == [0, 6.6, 6.6]
    assert stage.beta(2_500) == pytest.approx(3.3)


@pytest.mark.parametrize("likelihood", ["logit_laplace", "l2"])
def test_loss_is_the_joint_bound_divided_by_the_pixel_values(likelihood: str) -> None:
    stage, model = make(**TINY, likelihood=likelihood, beta_start=6.6)
    batch = batch_of(shapes(3))
    losses = stage.loss("model", {"model": model}, batch, step=7)
    # summed over everything, one sample at a time, from the definition
    total = 0.0
    for image, seed in zip(batch["image"], batch["seed"], strict=True):
        logits = model.encoder(phi(image[None]))
        noise = gumbel_noise(seed[None], 7, logits.numel()).view_as(logits)
        maps = model.decoder(((logits + noise) / stage.tau(7)).softmax(dim=-1))
        p = logits.softmax(dim=-1)
        kl = (p * (p * 32).log()).sum()
        nll = stage.likelihood.nll(maps, phi(image[None])).sum()
        total += float((nll + 6.6 * kl).detach()) / (16 * 16 * 3)
    assert losses.total.item() == pytest.approx(total / 3, rel=1e-5)
    assert not any(term.requires_grad for term in losses.terms.values())


def test_kl_weighs_beta_over_192_at_a_downsampling_of_8() -> None:
    values = {**TINY, "downsampling": 8, "multipliers": (1, 1, 1, 1)}
    weights = []
    for beta in (0.0, 6.6):
        stage, model = make(**values, beta_start=beta, beta_end=beta)
        weights.append(stage.loss("model", {"model": model}, batch_of(shapes(4)), step=0))
    without, with_kl = weights
    assert (with_kl.total - without.total).item() == pytest.approx(6.6 / 192 * float(with_kl.terms["kl"]), rel=1e-3)


def test_kl_is_raw_and_does_not_depend_on_batch_or_temperature() -> None:
    stage, model = make(**TINY)
    batch = batch_of(shapes(4))
    doubled = {key: torch.cat([value, value]) for key, value in batch.items()}
    kl = [float(stage.loss("model", {"model": model}, b, 0).terms["kl"]) for b in (batch, doubled)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)
    cold, _ = make(**TINY, tau_start=0.1)
    assert float(cold.loss("model", {"model": model}, batch, 0).terms["kl"]) == pytest.approx(kl[0], rel=1e-6)
    p = model.encoder(phi(batch["image"])).softmax(dim=-1)
    assert kl[0] == pytest.approx(math.log(32) + float((p * p.log()).sum(dim=-1).mean()), rel=1e-4)


def test_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    stage, model = make(**TINY)
    batch = batch_of(shapes(6))
    alone = [float(stage.loss("model", {"model": model}, rows(batch, [i]), 3).total) for i in range(6)]
    halves = [stage.loss("model", {"model": model}, rows(batch, slice(i, i + 3)), 3) for i in (0, 3)]
    together = stage.loss("model", {"model": model}, rows(batch, [5, 3, 1, 0, 2, 4]), 3)
    assert float(together.total) == pytest.approx(sum(alone) / 6, rel=1e-5)
    for name, value in together.terms.items():
        assert float(value) == pytest.approx(sum(float(half.terms[name]) for half in halves) / 2, rel=1e-5)
    assert float(stage.loss("model", {"model": model}, batch, 4).total) != float(together.total)


def test_empty_slots_do_not_count() -> None:
    stage, model = make(**TINY, usage_every=1)
    full = batch_of(shapes(4))
    padded = rows(full, [0, 1, 2, 3])
    padded["weight"] = torch.tensor([4 / 3, 4 / 3, 4 / 3, 0.0])  # as the loop scales them
    padded["image"] = padded["image"].clone()
    padded["image"][3] = 0
    three = stage.loss("model", {"model": model}, rows(full, slice(0, 3)), 0)
    values = stage.after_step({"model": model}, 0)
    four = stage.loss("model", {"model": model}, padded, 0)
    assert float(four.total) == pytest.approx(float(three.total), rel=1e-5)
    assert float(four.terms["mse"]) == pytest.approx(float(three.terms["mse"]), rel=1e-5)
    fresh = Stage(stage.config)
    fresh.loss("model", {"model": model}, padded, 0)
    assert {k: float(v) for k, v in fresh.after_step({}, 0).items()} == pytest.approx(
        {k: float(v) for k, v in values.items()}
    )


def test_usage_is_logged_at_its_cadence_and_only_from_training() -> None:
    stage, model = make(**TINY, usage_every=2)
    nets = {"model": model}
    batches = [batch_of(shapes(5, seed=seed)) for seed in range(2)]
    for step, batch in enumerate(batches):
        stage.loss("model", nets, batch, step)
        with torch.no_grad():
            stage.loss("model", nets, batch_of(shapes(5, seed=9)), step)  # validation
        values = stage.after_step(nets, step)
        assert bool(values) == (step == 1)
    codes = torch.cat([model(batch["image"])[2].flatten() for batch in batches])
    frequencies = torch.bincount(codes, minlength=32) / len(codes)
    assert float(values["codes_used"]) == float((frequencies > 0).float().mean())
    entropy = -sum(f * math.log(f) for f in frequencies.tolist() if f)
    assert float(values["perplexity"]) == pytest.approx(math.exp(entropy), rel=1e-5)
    mse = [float(stage.loss("model", nets, batch, step).terms["mse"]) for step, batch in enumerate(batches)]
    assert float(values["psnr_db"]) == pytest.approx(10 * math.log10(255**2 / (sum(mse) / 2)), rel=1e-5)


@pytest.mark.parametrize("values", [TINY, {**TINY, "likelihood": "l2"}, {**PATCH, "ln_b_floor": -3.0}])
def test_every_parameter_gets_a_gradient(values: dict[str, Any]) -> None:
    stage, model = make(**values, beta_start=1.0)
    stage.loss("model", {"model": model}, batch_of(shapes(8)), 0).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_kmeans_start_reaches_every_parameter_after_two_updates() -> None:
    """The last convolution of each branch starts at zero, so what lies before it moves from the second step on, and
    what feeds only those moves later still; channels beyond the patch meet zero weights at first."""
    stage, model = make(**KMEANS, beta_start=1.0)
    batch = batch_of(shapes(64))
    stage.initialize({"model": model}, iter([batch]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        stage.loss("model", {"model": model}, rows(batch, slice(0, 16)), step).total.backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("likelihood", ["logit_laplace", "l2"])
def test_training_lowers_the_loss(likelihood: str) -> None:
    stage, model = make(**TINY, likelihood=likelihood, beta_steps=100, tau_steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = batch_of(shapes(16))
    history = []
    for step in range(20):
        losses = stage.loss("model", {"model": model}, batch, step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(float(losses.terms["nll"]))
    assert history[-1] < history[0] - 0.1


@pytest.mark.parametrize("likelihood", ["logit_laplace", "l2"])
@pytest.mark.parametrize("sharpness", [1.0, 8.0, 100.0])
def test_kmeans_start_is_lossless_when_the_codebook_holds_all_patches(likelihood: str, sharpness: float) -> None:
    stage, model = make(**{**KMEANS, "vocab": 40}, likelihood=likelihood, init_sharpness=sharpness)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(256, (30, 3, 4, 4), generator=generator)
    patches[1:15] = patches[0]  # fifteen patches that differ from their neighbour by one level of one value
    patches[:15, 0, 1, 2] = 100 + torch.arange(15)
    patches[29] = 255
    choice = torch.randint(30, (64, 4, 4), generator=generator)
    choice[0, 0] = torch.arange(4)
    images = patches[choice].permute(0, 3, 1, 4, 2, 5).reshape(64, 3, 16, 16).to(torch.uint8)
    nets = {"model": model}
    stage.initialize(nets, iter([batch_of(images)]))
    tokenizer = stage.tokenizer(nets)
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes), images)
    assert torch.equal(torch.unique(codes), torch.arange(len(torch.unique(choice))))
    result = stage.evaluate(nets, [batch_of(images)])
    assert 60 < result["psnr_db"] < math.inf and result["codes_used"] == len(torch.unique(choice)) / 40


def test_kmeans_start_is_kmeans_and_beats_random_weights() -> None:
    images = shapes(96)
    stage, model = make(**KMEANS)
    nets = {"model": model}
    batch = batch_of(images)
    before = stage.evaluate(nets, [batch])
    stage.initialize(nets, iter([rows(batch, slice(0, 40)), rows(batch, slice(40, 96))]))
    after = stage.evaluate(nets, [batch])
    assert after["psnr_db"] > before["psnr_db"] + 5 and after["codes_used"] > 0.9

    patches = phi(images).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48)
    tokenizer = stage.tokenizer(nets)
    table = tokenizer.decode(torch.arange(32)[:, None].expand(32, 16))  # every code as an image of 4 x 4 copies
    centroids = phi(table)[:, :, :4, :4].flatten(1)
    # a mean of bytes may end in one half, and which byte that gives is up to rounding, at every place anew
    assert int((table[:, :, :4, :4].int() - table[:, :, 8:12, 4:8].int()).abs().max()) <= 1
    nearest = torch.cdist(patches, centroids).argmin(dim=1)  # decoded centroids are rounded: ties may fall otherwise
    assert float((nearest == tokenizer.encode(images).flatten()).float().mean()) > 0.99


def test_initialize_takes_only_what_it_needs() -> None:
    def endless() -> Any:
        for index in range(4):
            batch = batch_of(shapes(20, seed=index))
            batch["weight"][0] = 0
            batch["image"][0] = torch.randint(256, (3, 16, 16))  # an empty slot's content is meaningless
            yield batch
        raise AssertionError("asked for more than init_samples")

    stage, model = make(**{**KMEANS, "vocab": 4096})
    stage.initialize({"model": model}, endless())
    used = torch.cat([shapes(20, seed=index)[1:] for index in range(4)])[:64]
    patches = F.unfold(used.float(), 4, stride=4).transpose(1, 2).flatten(0, 1)
    held = int((model.encoder.output.bias != -1e4).sum())
    assert held == len(torch.unique(patches, dim=0))


def test_random_init_leaves_the_weights_alone() -> None:
    stage, model = make(**TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage.initialize({"model": model}, iter([]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluate_against_brute_force() -> None:
    stage, model = make(**TINY)
    images = shapes(10)
    batches = [batch_of(images[:7]), batch_of(images[7:])]
    batches[0]["weight"][2] = 0
    kept = images[[0, 1, 3, 4, 5, 6, 7, 8, 9]]
    result = stage.evaluate({"model": model}, iter(batches))
    tokenizer = stage.tokenizer({"model": model})
    codes = tokenizer.encode(kept)
    assert_psnr(result, tokenizer.decode(codes), kept)
    assert_usage(result, codes, vocab=32)


def test_tokenizer() -> None:
    stage, model = make(**TINY)
    images = shapes(5)
    tokenizer = stage.tokenizer({"model": model})
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.vocab, tokenizer.grids, tokenizer.image_size) == (32, (4,), 16)
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    assert torch.equal(codes, model.encoder(phi(images)).argmax(dim=-1).flatten(1))  # raster order
    decoded = tokenizer.decode(codes.to(torch.int32))
    assert decoded.shape == (5, 3, 16, 16) and decoded.dtype == torch.uint8
    assert not decoded.requires_grad
    mu = model.decoder(codes.view(5, 4, 4))[:, :3].double()
    expected = ((1 / (1 + torch.exp(-mu)) - 0.1) * 255 / 0.8).clamp(0, 255).round()
    assert float((decoded - expected).abs().max()) <= 1 and float((decoded == expected).double().mean()) > 0.99


def test_tokenizer_takes_any_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, model = make(**TINY)
    images = shapes(7)
    whole = stage.tokenizer({"model": model})
    monkeypatch.setattr("dalle_scale.stages.dvae._LOGITS_AT_ONCE", 2 * 16 * 32 + 5)
    parts = stage.tokenizer({"model": model})
    codes = whole.encode(images)
    assert same_codes(codes, parts.encode(images)) and same_images(whole.decode(codes), parts.decode(codes))


def test_preview_shows_originals_above_hard_reconstructions() -> None:
    stage, model = make(**TINY)
    images = shapes(12)
    (decoded,) = stage.preview({"model": model}, batch_of(images)).values()
    tokenizer = stage.tokenizer({"model": model})
    assert decoded.shape == (8, 3, 32, 16) and decoded.dtype == torch.uint8
    assert torch.equal(decoded[:, :, :16], images[:8])
    assert torch.equal(decoded[:, :, 16:], tokenizer.decode(tokenizer.encode(images[:8])))


def test_export_round_trip(tmp_path: Any) -> None:
    stage, model = make(**TINY)
    export.save(tmp_path / "export", "dvae", stage.config, {"model": model.state_dict()})
    tokenizer = export.open_tokenizer(tmp_path / "export")
    images = shapes(3)
    assert torch.equal(tokenizer.encode(images), stage.tokenizer({"model": model}).encode(images))


def test_flops() -> None:
    stage, _ = make(**SMALLEST, blocks_per_group=1)
    # By hand. A block 4 -> 4 is 1 wide inside: 4 k^2, k^2, k^2, 4 k^2 multiplications a pixel. Encoder:
    # 7x7 input and a group at 8x8, a group and the head at 4x4; the decoder the other way round.
    encoder_block, decoder_block = 4 * 9 + 9 + 9 + 4 * 1, 4 * 1 + 9 + 9 + 4 * 9
    encoder = 64 * (3 * 4 * 49 + encoder_block) + 16 * (encoder_block + 4 * 4)
    decoder = 16 * (4 * 4 + decoder_block) + 64 * (decoder_block + 4 * 6)
    assert stage.flops_per_sample() == 3 * 2 * (encoder + decoder)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vocab": 65537}, "vocab = 65537.*65536"),
        ({"downsampling": 6}, "downsampling = 6: .*power of two"),
        ({"image_size": 100}, "downsampling = 8: .*divides image_size 100"),
        ({"multipliers": [1, 2, 4]}, "multipliers = .*pools 3 times and needs at least 4 groups"),
        ({"downsampling": 16}, "multipliers = .*pools 4 times and needs at least 5 groups"),
        ({"n_hid": 30}, "n_hid = 30: .*multiple of 4"),
        ({"init": "kmeans"}, "init = 'kmeans': .*needs stem: patch"),
        ({"init": "kmeans", "stem": "patch"}, "init = 'kmeans': .*192 values.*n_init"),
        ({"tau_end": 0}, "tau_end = 0"),
        ({"taus": 0}, "unknown key 'taus'; did you mean"),
    ],
)
def test_bad_values_get_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_config.parse(Stage.Config, values, where="dvae.yaml")
    assert "\n" not in str(caught.value)
