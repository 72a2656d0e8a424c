"""The VQ-VAE-2 stage: levels, loss, k-means start, evaluation, tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.batches import assert_psnr, assert_usage, batch_of, quarters
from torch import Tensor

from dalle_scale import config as run_config
from dalle_scale.checkpoint import export
from dalle_scale.models.vqvae import to_bytes
from dalle_scale.stages.vqvae2 import VQVAE2, Stage
from dalle_scale.types import UserError

TINY = {"image_size": 16, "downsampling": 2, "levels": 2, "width": 8, "residual_width": 4, "blocks": 1, "dim": 6}
FOUND = {"vocab": 16, "restart_below": 0.5, "init": "kmeans", "init_samples": 24}


def make(quantizer: dict[str, Any] | None = None, **values: Any) -> tuple[Stage, VQVAE2]:
    """Stage and model with seeded weights."""
    torch.manual_seed(0)
    tree = {**TINY, "quantizer": quantizer or {"vocab": 16}, **values}
    stage = Stage(run_config.parse(Stage.Config, tree, where="test"))
    model = stage.nets()["model"]
    assert isinstance(model, VQVAE2)
    return stage, model


def test_grids_of_the_paper() -> None:
    stage = Stage(Stage.Config())
    assert stage.config.grids == (32, 64) and stage.inputs.image_size == 256
    faces = Stage.Config(image_size=1024, downsampling=8, levels=3)
    assert faces.grids == (32, 64, 128)
    with torch.device("meta"):
        pixels, codes, loss = Stage(faces).nets()["model"](torch.empty(2, 3, 1024, 1024, dtype=torch.uint8))
    assert pixels.shape == (2, 3, 1024, 1024) and loss.shape == (2,)
    assert [tuple(squares.shape) for squares in codes] == [(2, 32, 32), (2, 64, 64), (2, 128, 128)]


def nearest(features: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and their vectors by brute force."""
    codes = torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), codebook).argmin(dim=1)
    return codes, codebook[codes].view(len(features), *features.shape[2:], -1).permute(0, 3, 1, 2)


def test_two_levels_written_out() -> None:
    """The bottom is quantized with the decoded top beside it; the image is decoded from both."""
    stage, model = make()
    batch = batch_of(quarters(3))
    x = batch["image"].float() / 127.5 - 1
    bottom = model.encoders[1](x)
    top = model.encoders[0](bottom)
    top_features = model.to_features[0](top)
    top_codes, top_values = nearest(top_features, model.quantizers[0].codebook)
    bottom_features = model.to_features[1](torch.cat([model.contexts[0](top_values), bottom], dim=1))
    bottom_codes, bottom_values = nearest(bottom_features, model.quantizers[1].codebook)
    pixels = model.decoder(torch.cat([model.enlarge[0](top_values), bottom_values], dim=1))
    commitment = (top_features - top_values).square().mean() + (bottom_features - bottom_values).square().mean()
    want = (pixels - x).square().mean() + 0.25 * commitment
    losses = stage.loss("model", {"model": model}, batch, 0)
    torch.testing.assert_close(losses.total, want)
    assert float(losses.terms["quantizer_loss"]) == pytest.approx(0.25 * commitment.item(), rel=1e-5)
    _, codes, _ = model(batch["image"])
    assert torch.equal(codes[0].flatten(), top_codes) and torch.equal(codes[1].flatten(), bottom_codes)


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("update", ["ema", "loss"])
def test_every_parameter_gets_a_gradient(levels: int, update: str) -> None:
    stage, model = make({"vocab": 16, "update": update}, levels=levels)
    stage.loss("model", {"model": model}, batch_of(quarters(8)), 0).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert [float(q.counts.sum()) for q in model.quantizers if update == "ema"] == (
        [8 * grid**2 for grid in stage.config.grids] if update == "ema" else []
    )


@pytest.mark.parametrize("levels", [2, 3])
def test_training_lowers_the_error_and_reports_each_level(levels: int) -> None:
    stage, model = make(FOUND, levels=levels, usage_every=10, usage_window_samples=160)
    nets = {"model": model}
    stage.initialize(nets, iter([batch_of(quarters(40))]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(30):
        losses = stage.loss("model", nets, batch_of(quarters(16, seed=step)), step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values = stage.after_step(nets, step)
        assert bool(values) == (step % 10 == 9)
        history.append({name: float(value) for name, value in {**losses.terms, **values}.items()})
    assert history[-1]["mse"] < 0.8 * history[0]["mse"]
    grids = stage.config.grids
    assert set(values) == {"psnr_db"} | {f"{name}_{grid}" for name in ("codes_used", "perplexity") for grid in grids}
    assert all(1 < history[-1][f"perplexity_{grid}"] <= 16 * history[-1][f"codes_used_{grid}"] for grid in grids)


def test_kmeans_start_goes_down_the_levels() -> None:
    """Each level is clustered as it will be seen: with the new codes of those above it."""
    stage, model = make(FOUND, levels=3)
    stage.initialize({"model": model}, iter([batch_of(quarters(40))]))
    model.eval()
    images = quarters(40)[:24]
    hidden, maps = model.hidden(images), None
    for level in range(3):
        features = model.features(level, hidden, maps).detach()
        points = features.permute(0, 2, 3, 1).flatten(0, 2)
        codes, values = nearest(features, model.quantizers[level].codebook)
        for code in codes.unique():  # a centroid is the mean of what it is nearest to, once k-means stands still
            torch.testing.assert_close(
                model.quantizers[level].codebook[code], points[codes == code].mean(dim=0), rtol=0.05, atol=0.01
            )
        maps = model.stack(level, maps, values)


def test_evaluate_against_the_tokenizer() -> None:
    stage, model = make()
    images = quarters(9)
    batches = [batch_of(images[:5]), batch_of(images[5:])]
    batches[1]["weight"][0] = 0
    kept = images[[0, 1, 2, 3, 4, 6, 7, 8]]
    model.eval()
    result = stage.evaluate({"model": model}, iter(batches))
    tokenizer = stage.tokenizer({"model": model})
    codes = tokenizer.encode(kept)
    assert_psnr(result, tokenizer.decode(codes), kept)
    for grid, part in zip((4, 8), torch.split(codes, [16, 64], dim=1), strict=True):
        assert_usage(result, part, vocab=16, ending=f"_{grid}")


def test_tokenizer_of_an_export(tmp_path: Any) -> None:
    stage, model = make()
    images = quarters(5)
    tokenizer = stage.tokenizer({"model": model})
    assert (tokenizer.vocab, tokenizer.grids, tokenizer.image_size) == (16, (4, 8), 16)
    codes = tokenizer.encode(images)
    assert codes.shape == (5, 4 * 4 + 8 * 8) and codes.dtype == torch.int64
    pixels, squares, _ = model(images)
    assert torch.equal(codes, torch.cat([level.flatten(1) for level in squares], dim=1))
    assert torch.equal(tokenizer.decode(codes), to_bytes(pixels.detach()))
    with torch.no_grad():
        preview = stage.preview({"model": model}, batch_of(images))["reconstruction"]
    assert torch.equal(preview, torch.cat([images, tokenizer.decode(codes)], dim=2))
    export.save(tmp_path / "export", "vqvae2", stage.config, {"model": model.state_dict()}, {})
    opened = export.load(tmp_path / "export")
    again = opened.stage.tokenizer(opened.nets)
    assert torch.equal(again.encode(images), codes)


def test_sides_must_divide() -> None:
    with pytest.raises(UserError, match=r"levels = 4: .*downsampling x 2\^\(levels - 1\) = 32") as caught:
        make(image_size=48, downsampling=4, levels=4)
    assert "\n" not in str(caught.value)
