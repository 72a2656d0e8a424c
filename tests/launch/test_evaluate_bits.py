"""Bits per dimension of launch/evaluate.py: against a plain recomputation image by image; whose prior is whose."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support.exports import save, save_dvae, write_data
from support.priors import DALLE, PIXELSNAIL, TEXT, save_prior, save_text
from support.processes import ROOT

from dalle_scale.checkpoint import export
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data.text import open_text
from dalle_scale.evaluation import reconstruction
from dalle_scale.types import UserError

CPU = torch.device("cpu")
VALUES = 3 * 16 * 16
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((ROOT / f"configs/tiny/{name}.yaml").read_text())["model"], **changes}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`valid`: the data; exports of 16 x 16: `dvae` and its priors `guided` (captions or none), `told` (captions only)
    and `plain` (no captions); `vqvae2` and its priors `top` and `bottom`; `vae`, `bits` and
    `ddpm`, without codes, `ddpm_told` (captions only)."""
    folder = tmp_path_factory.mktemp("bits")
    write_data(folder / "valid")
    parts = {"tokenizer": save_dvae(folder / "dvae", image_size=16), "text_tokenizer": save_text(folder)}
    sizes = {"image_vocab": 64, "grid": 4, **DALLE}
    save_prior(folder / "guided", "dalle", parts, caption_dropout=0.1, **sizes)
    save_prior(folder / "told", "dalle", parts, **sizes)
    save_prior(folder / "plain", "dalle", None, **{**sizes, "text_length": 0})
    levels = {"tokenizer": save(folder / "vqvae2", "vqvae2", **tiny("vqvae2", image_size=16))}
    sizes = {"grids": [2, 4], "vocab": 32, **PIXELSNAIL}
    save_prior(folder / "top", "vqvae2_prior", levels, level=0, **sizes)
    save_prior(folder / "bottom", "vqvae2_prior", levels, level=1, **sizes)
    both = {**levels, "text_tokenizer": parts["text_tokenizer"]}
    save_prior(folder / "bottom_told", "vqvae2_prior", both, level=1, **sizes, **TEXT)
    vae = tiny("vae", image_size=16, importance_samples=2)
    save(folder / "vae", "vae", **vae)
    save(folder / "bits", "vae", **{**vae, "likelihood": "bernoulli"})
    save(folder / "ddpm", "ddpm", **tiny("ddpm", timesteps=8))
    save(folder / "ddpm_told", "ddpm", **tiny("ddpm", timesteps=8, caption_dropout=0.0))
    return folder


def measure(work: Path, name: str, *priors: str, data: str = "valid") -> dict[str, Any]:
    [subject] = reconstruction.open_subjects([work / name], CPU, [work / prior for prior in priors])
    ledger = work / "ledger.jsonl"
    source = reconstruction.open_images(work / data, 16, None, 8, ledger, prior=subject.prior)
    return reconstruction.measure(subject, source, CPU)


def samples(work: Path) -> list[tuple[torch.Tensor, str]]:
    """Every readable image, uint8 [3, 16, 16], with its caption."""
    source = reconstruction.open_images(work / "valid", 16, None, 8, work / "ledger.jsonl")
    batches = [batch for _, batch in source.read(CPU)]
    ids, images = (torch.cat([batch[key] for batch in batches]) for key in ("id", "image"))
    return [(image, f"image number {id}") for id, image in zip(ids.tolist(), images, strict=True) if id >= 0]


def probability(family: str, m: int, x: int, scale: float) -> float:
    """Of byte x around byte m: a difference of the distribution function."""

    def below(z: float) -> float:
        return math.erfc(-z / math.sqrt(2)) / 2 if family == "normal" else 1 / (1 + math.exp(-z))

    low = 0.0 if x == 0 else below((x - 0.5 - m) / scale)
    return (1.0 if x == 255 else below((x + 0.5 - m) / scale)) - low


def pixel_bits(work: Path, name: str, told: str) -> float:
    """Of all images together, by the distribution that the table names, pixel by pixel."""
    tokenizer, total = export.open_tokenizer(work / name), 0.0
    family, scale = told.split()
    [exact] = [value for value in (2.0 ** (-3 + 9 * step / 63) for step in range(64)) if f"{value:.3g}" == scale]
    for image, _ in samples(work):
        decoded = tokenizer.decode(tokenizer.encode(image[None]))[0]
        pairs = zip(decoded.flatten().tolist(), image.flatten().tolist(), strict=True)
        total -= sum(math.log2(probability(family, m, x, exact)) for m, x in pairs)
    return total + 7


def prior_bits(work: Path, tokenizer: str, *priors: str, captions: bool = False) -> float:
    """An image, one after the other."""
    opened = [export.load(work / prior) for prior in priors]
    encode, text = export.open_tokenizer(work / tokenizer).encode, open_text(work / "text.model", TEXT["text_vocab"])
    total = []
    for image, caption in samples(work):
        codes = encode(image[None])
        tokens = text.encode([caption if captions else ""], TEXT["text_length"])
        bits = 0.0
        for model in opened:
            takes = model.stage.config.text_length > 0
            bits += float(model.stage.code_bits(model.nets, codes, tokens if takes else None))
        total.append(bits)
    assert len(total) == 44
    return sum(total) / 44


def check_parts(row: dict[str, Any]) -> None:
    assert row["bits_per_dim"] == pytest.approx(row["pixel_bits_per_dim"] + row["code_bits_per_dim"], rel=1e-12)


def test_without_prior_codes_cost_their_bits(work):
    row = measure(work, "dvae")
    check_parts(row)
    assert row["code_bits_per_dim"] == 16 * 6 / VALUES and row["bits"] == 16 * 6
    want = pixel_bits(work, "dvae", row["pixel_noise"])
    assert row["pixel_bits_per_dim"] * 44 * VALUES == pytest.approx(want, rel=1e-5)
    assert not {"prior_bits", "prior_bits_given_caption", "bits_per_dim_given_caption"} & set(row)


def test_prior_with_and_without_captions(work):
    row, bare = measure(work, "dvae", "guided"), measure(work, "dvae")
    check_parts(row)
    assert row["prior_bits"] == pytest.approx(prior_bits(work, "dvae", "guided"), rel=1e-5)
    given = prior_bits(work, "dvae", "guided", captions=True)
    assert row["prior_bits_given_caption"] == pytest.approx(given, rel=1e-5)
    assert abs(given - row["prior_bits"]) > 1e-3 and abs(row["prior_bits"] - 16 * 6) > 0.1
    assert row["code_bits_per_dim"] == row["prior_bits"] / VALUES
    assert row["bits_per_dim_given_caption"] == pytest.approx(row["pixel_bits_per_dim"] + given / VALUES, rel=1e-6)
    for key in ("psnr_db", "ssim", "bits", "entropy_bits", "pixel_bits_per_dim", "samples"):
        assert row[key] == bare[key], key


def test_prior_of_captions_only_bounds_nothing_without(work):
    row = measure(work, "dvae", "told")
    check_parts(row)
    assert "prior_bits" not in row and row["code_bits_per_dim"] == 16 * 6 / VALUES
    assert row["prior_bits_given_caption"] == pytest.approx(prior_bits(work, "dvae", "told", captions=True), rel=1e-5)


def test_prior_without_captions(work):
    row = measure(work, "dvae", "plain")
    check_parts(row)
    assert row["prior_bits"] == pytest.approx(prior_bits(work, "dvae", "plain"), rel=1e-5)
    assert "prior_bits_given_caption" not in row


def test_priors_of_levels(work):
    row = measure(work, "vqvae2", "bottom", "top")
    check_parts(row)
    assert row["prior_bits"] == pytest.approx(prior_bits(work, "vqvae2", "top", "bottom"), rel=1e-5)
    assert row["prior_bits"] / VALUES == row["code_bits_per_dim"] and "prior_bits_given_caption" not in row
    told = measure(work, "vqvae2", "bottom_told", "top")
    given = prior_bits(work, "vqvae2", "top", "bottom_told", captions=True)
    assert told["prior_bits_given_caption"] == pytest.approx(given, rel=1e-5) and "prior_bits" not in told


def test_each_tokenizer_has_its_own_priors(work):
    folders, priors = [work / "vqvae2", work / "vae", work / "dvae"], [work / "bottom", work / "guided", work / "top"]
    subjects = reconstruction.open_subjects(folders, CPU, priors)
    assert [subject.prior and subject.prior.folder.name for subject in subjects] == ["top", None, "guided"]


def test_exact_tokenizer_costs_its_codes(work):
    save(work / "exact", "support.exact")
    row = measure(work, "exact")
    assert row["pixel_noise"] == "normal 0.125" and 8 < row["bits_per_dim"] < 8.001


def test_elbo_is_in_the_same_column(work):
    row = measure(work, "vae")
    assert "elbo_bits_per_dim" not in row and row["bits_per_dim"] >= row["iwae_bits_per_dim"] > 0
    [subject] = reconstruction.open_subjects([work / "vae"], CPU)
    source = reconstruction.open_images(work / "valid", 16, None, 8, work / "ledger.jsonl")
    own = subject.export.stage.evaluate(subject.export.nets, [batch for _, batch in source.read(CPU)])
    assert row["bits_per_dim"] == own["elbo_bits_per_dim"]


def test_bound_of_black_and_white_images_is_not(work):
    row = measure(work, "bits")
    assert "bits_per_dim" not in row and row["elbo_bits_per_dim"] > 0


def test_captions_that_are_missing(work, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 200, 90)).save(file, "png")
    with ShardWriter(tmp_path / "uncaptioned") as writer:
        writer.add("0", {"png": file.getvalue()})
    row = measure(work, "dvae", "guided", data=str(tmp_path / "uncaptioned"))
    assert row["samples"] == 1 and row["prior_bits"] > 0 and "prior_bits_given_caption" not in row
    with pytest.raises(UserError, match=r"has no captions, and .*told models codes given captions only"):
        measure(work, "dvae", "told", data=str(tmp_path / "uncaptioned"))


def test_text_tokenizer_may_be_named(work, tmp_path):
    """A model that was trained with a tokenizer by name holds none."""
    prior = save_prior(tmp_path / "guided", "dalle", None, image_vocab=64, grid=4, caption_dropout=0.1, **DALLE)
    [bare] = reconstruction.open_subjects([work / "dvae"], CPU, [prior])
    with pytest.raises(UserError, match="holds no text tokenizer; name the one of its training with --text-tokenizer"):
        reconstruction.open_images(work / "valid", 16, None, 8, work / "ledger.jsonl", prior=bare.prior)
    [named] = reconstruction.open_subjects([work / "dvae"], CPU, [prior], str(work / "text.model"))
    source = reconstruction.open_images(work / "valid", 16, None, 8, work / "ledger.jsonl", prior=named.prior)
    row, want = reconstruction.measure(named, source, CPU), measure(work, "dvae", "guided")
    assert row["prior_bits_given_caption"] == want["prior_bits_given_caption"], "the same weights"


def test_a_diffusion_model_with_captions_is_shown_none(work):
    row, opened = measure(work, "ddpm"), export.load(work / "ddpm")
    source = reconstruction.open_images(work / "valid", 16, None, 8, work / "ledger.jsonl")
    batches = [batch for _, batch in source.read(CPU)]
    expected = opened.stage.evaluate(opened.nets, batches)
    assert row["bits_per_dim"] == pytest.approx(expected["elbo_bits_per_dim"]) and row["samples"] == 44
    with pytest.raises(UserError, match="trained without caption_dropout"):
        measure(work, "ddpm_told")
