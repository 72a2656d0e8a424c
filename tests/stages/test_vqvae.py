"""The VQ-VAE stage: network, loss, invariances, k-means start, evaluation, tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import assert_psnr, assert_usage, batch_of, quarters, rows
from torch import nn

from dalle_scale import config as run_config
from dalle_scale.checkpoint import export
from dalle_scale.models.vqvae import to_bytes, to_levels, to_pixels
from dalle_scale.stages.vqvae import VQVAE, Stage
from dalle_scale.types import Batch, ImageTokenizer, UserError

TINY = {"image_size": 16, "downsampling": 4, "width": 12, "residual_width": 6, "blocks": 1, "dim": 8}
SMALL_BOOK = {"vocab": 24}
FOUND = {"vocab": 24, "restart_below": 0.5, "ema_decay": 0.9, "init": "kmeans", "init_samples": 40}


def make(quantizer: dict[str, Any] | None = None, **values: Any) -> tuple[Stage, VQVAE]:
    """Stage and model with seeded weights."""
    torch.manual_seed(0)
    tree = {**TINY, "quantizer": quantizer or SMALL_BOOK, **values}
    stage = Stage(run_config.parse(Stage.Config, tree, where="test"))
    model = stage.nets()["model"]
    assert isinstance(model, VQVAE)
    return stage, model


def step_of(stage: Stage, model: VQVAE, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> dict[str, float]:
    """One step as the loop makes it; the terms of the loss."""
    losses = stage.loss("model", {"model": model}, batch, step)
    optimizer.zero_grad()
    losses.total.backward()
    optimizer.step()
    extra = stage.after_step({"model": model}, step)
    return {name: float(value) for name, value in {**losses.terms, **extra}.items()}


def test_network_of_the_paper() -> None:
    """Section 4.1: two 4x4 convolutions of stride 2, two residual blocks of 256, and the mirror of it."""
    stage = Stage(Stage.Config())
    assert stage.config.grid == 8 and (stage.config.quantizer.vocab, stage.config.quantizer.commitment) == (512, 0.25)
    with torch.device("meta"):
        model = stage.nets()["model"]
    assert isinstance(model, VQVAE)
    residual = 2 * (256 * 256 * 9 + 256 + 256 * 256 + 256)
    encoder = (3 * 256 * 16 + 256) + (256 * 256 * 16 + 256) + residual
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    decoder = (64 * 256 * 9 + 256) + residual + (256 * 256 * 16 + 256) + (256 * 3 * 16 + 3)
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    kinds = [type(layer).__name__ for layer in model.encoder.layers]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "Residual", "Residual", "ReLU"]


def test_pixels() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    pixels = to_pixels(images)
    assert (float(pixels.min()), float(pixels.max())) == (-1, 1)
    assert torch.equal(to_bytes(pixels), images) and torch.allclose(to_levels(pixels), images.float(), atol=1e-4)
    assert to_levels(torch.tensor([-1.5, 2.0])).tolist() == [0, 255]


@pytest.mark.parametrize("likelihood", ["mse", "gaussian"])
def test_loss_from_the_definition(likelihood: str) -> None:
    stage, model = make(likelihood=likelihood, gaussian_std=0.3)
    batch = batch_of(quarters(3))
    losses = stage.loss("model", {"model": model}, batch, 0)
    total, mse = 0.0, 0.0
    for image in batch["image"]:
        x = image[None].float() / 127.5 - 1
        features = model.to_features(model.encoder(x))
        distance = torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), model.quantizer.codebook)
        chosen = model.quantizer.codebook[distance.argmin(dim=1)].T.view_as(features)
        pixels = model.decoder(chosen)
        reconstruction = (pixels - x).square().mean()
        if likelihood == "gaussian":
            normal = torch.distributions.Normal(pixels, 0.3)
            reconstruction = -normal.log_prob(x).mean()
        total += float((reconstruction + 0.25 * (features - chosen).square().mean()).detach()) / 3
        mse += float((((pixels + 1) * 127.5).clamp(0, 255) - image.float()).square().mean().detach()) / 3
    assert losses.total.item() == pytest.approx(total, rel=1e-5)
    assert float(losses.terms["mse"]) == pytest.approx(mse, rel=1e-5)
    assert set(losses.terms) == {"mse", "quantizer_loss"} | ({"nll"} if likelihood == "gaussian" else set())


def test_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    stage, model = make()
    batch = batch_of(quarters(6))
    alone = [stage.loss("model", {"model": model}, rows(batch, [i]), 3).total.item() for i in range(6)]
    assert stage.loss("model", {"model": model}, batch, 3).total.item() == pytest.approx(sum(alone) / 6, rel=1e-5)


@pytest.mark.parametrize("quantizer", [{"vocab": 24, "update": "loss"}, {"vocab": 24, "code_dim": 3, "rotation": True}])
def test_every_parameter_gets_a_gradient(quantizer: dict[str, Any]) -> None:
    stage, model = make(quantizer)
    stage.loss("model", {"model": model}, batch_of(quarters(8)), 0).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_optimizer_has_no_codebook() -> None:
    _, model = make()
    assert not [name for name, _ in model.named_parameters() if name.startswith("quantizer")]


def test_training_lowers_the_error_and_reports_usage() -> None:
    stage, model = make(FOUND, usage_every=10, usage_window_samples=160)
    stage.initialize({"model": model}, iter([batch_of(quarters(64))]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = [step_of(stage, model, optimizer, batch_of(quarters(16, seed=step)), step) for step in range(40)]
    assert history[-1]["mse"] < 0.8 * history[0]["mse"]
    assert [step for step, line in enumerate(history) if "codes_used" in line] == [9, 19, 29, 39]
    assert history[-1]["psnr_db"] > history[9]["psnr_db"]
    assert 1 < history[-1]["perplexity"] <= 24 * history[-1]["codes_used"]


def test_kmeans_start() -> None:
    """From `init_samples` images, no more, and without those of empty slots."""

    def endless() -> Any:
        for index in range(4):
            batch = batch_of(quarters(12, seed=index))
            batch["weight"][0] = 0
            batch["image"][0] = torch.randint(256, (3, 16, 16))
            yield batch
        raise AssertionError("asked for more than init_samples")

    stage, model = make(FOUND)
    before = model.quantizer.codebook.clone()
    stage.initialize({"model": model}, endless())
    used = torch.cat([quarters(12, seed=index)[1:] for index in range(4)])[:40]
    features = model.features(used).detach().permute(0, 2, 3, 1).flatten(0, 2)
    assert not torch.equal(model.quantizer.codebook, before)
    error = torch.cdist(features, model.quantizer.codebook).min(dim=1).values.square().mean()
    assert float(error) < 0.5 * float((features - features.mean(dim=0)).square().sum(dim=1).mean())
    stage, model = make({"vocab": 24})
    before = model.quantizer.codebook.clone()
    stage.initialize({"model": model}, iter([]))
    assert torch.equal(model.quantizer.codebook, before)
    stage, model = make({"vocab": 24, "init": "kmeans", "init_samples": 1})
    with pytest.raises(UserError, match=r"16 vectors cannot give 24 codes; raise quantizer\.init_samples, now 1"):
        stage.initialize({"model": model}, iter([batch_of(quarters(4))]))


def test_evaluation_counts_right_and_changes_nothing() -> None:
    stage, model = make(FOUND)
    model.eval()
    images = quarters(10)
    batches = [batch_of(images[:7]), batch_of(images[7:])]
    batches[0]["weight"][2] = 0
    kept = images[[0, 1, 3, 4, 5, 6, 7, 8, 9]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = stage.evaluate({"model": model}, iter(batches))
    assert stage.evaluate({"model": model}, iter(batches)) == result
    stage.loss("model", {"model": model}, batches[0], 0)
    model.quantizer.after_step(0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tokenizer = stage.tokenizer({"model": model})
    codes = tokenizer.encode(kept)
    assert_psnr(result, tokenizer.decode(codes), kept)
    assert_usage(result, codes, vocab=24)


def test_tokenizer_of_an_export(tmp_path: Any) -> None:
    stage, model = make()
    images = quarters(5)
    tokenizer = stage.tokenizer({"model": model})
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.vocab, tokenizer.grids, tokenizer.image_size) == (24, (4,), 16)
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 16) and codes.dtype == torch.int64
    pixels, squares, _ = model(images)
    assert torch.equal(codes, squares.flatten(1)) and torch.equal(tokenizer.decode(codes), to_bytes(pixels.detach()))
    with torch.no_grad():
        preview = stage.preview({"model": model}, batch_of(images))["reconstruction"]
    assert torch.equal(preview, torch.cat([images, tokenizer.decode(codes)], dim=2))
    export.save(tmp_path / "export", "vqvae", stage.config, {"model": model.state_dict()}, {})
    wide = tokenizer.decode_grid(torch.cat([codes.view(5, 4, 4)] * 2, dim=2))
    assert wide.shape == (5, 3, 16, 32), "twice as many columns"
    opened = export.open_tokenizer(tmp_path / "export", torch.device("cpu"))
    assert torch.equal(opened.encode(images), codes) and torch.equal(opened.decode(codes), tokenizer.decode(codes))


def test_recomputed_activations_change_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        stage, model = make(FOUND)
        for module in model.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = recompute
        stage.loss("model", {"model": model}, batch_of(quarters(4)), 0).total.backward()
        assert float(model.quantizer.counts.sum()) == 4 * 16
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_flops() -> None:
    """Multiplications by hand, times two for the additions, times three for the backward pass."""
    stage, model = make()
    total = 4 * 4 * 8 * 24  # distances
    sides = {model.encoder.layers[0]: 8, model.decoder.layers[-1]: 8, model.decoder.layers[-3]: 4}
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            total += layer.weight.numel() * sides.get(layer, 4) ** 2
    assert stage.flops_per_sample() == 6 * total


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"downsampling": 3}, "must be a power of two that divides image_size 16"),
        ({"quantizer": {"vocabs": 3}}, "unknown key 'quantizer.vocabs'; did you mean 'vocab'"),
    ],
)
def test_wrong_configs_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)
