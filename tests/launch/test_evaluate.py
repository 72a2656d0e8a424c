"""launch/evaluate.py: numbers against plain recomputation, the table in three forms, images, wrong input."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from support.exports import DAMAGED, save, save_dvae, write_data
from support.processes import HANG_SECONDS, ROOT
from support.programs import run_here

from dalle_scale.checkpoint import export
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest, manifest_table
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.evaluation import reconstruction, reconstruction_page
from dalle_scale.evaluation.metrics.ssim import ssim
from dalle_scale.nn import precision
from dalle_scale.report.page import render
from dalle_scale.types import ImageTokenizer, UserError

PROGRAM = ROOT / "launch" / "evaluate.py"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CPU = torch.device("cpu")
run = partial(run_here, PROGRAM)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`valid`: the data; `dvae/export`, `small/export`, `exact`, `bounds`: exports."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder / "valid")
    save_dvae(folder / "dvae" / "export")
    save_dvae(folder / "small" / "export", image_size=16)
    save(folder / "exact", "support.exact", size=24)
    save(folder / "bounds", "support.bounds")
    return folder


@pytest.fixture(scope="module")
def done(work: Path) -> Path:
    names = ("dvae/export", "small/export", "exact", "bounds")
    code, printed = run("--data", work / "valid", "--out", work / "out", "--batch-size", 16, *(work / n for n in names))
    assert code == 0, printed
    return work / "out"


def numbers(done: Path) -> dict[str, dict[str, Any]]:
    document = json.loads((done / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return {row["name"]: row for row in document["exports"]}


def read_all(folder: Path, size: int) -> torch.Tensor:
    """Every readable image, uint8 [44, 3, S, S], in the order of the shards."""
    reader = Reader(Manifest.open(folder))
    images = [square(decode(reader.read_image(sample)), size) for sample in range(45) if sample != DAMAGED]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class OneByOne:
    """A tokenizer that gets one image at a time, in memory of its own. So the kernels are the same whatever the
    batch, and with them the bits: rounding may choose another code or byte where kernels differ."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.vocab, self.grids, self.image_size = tokenizer.vocab, tokenizer.grids, tokenizer.image_size
        self.whole = tokenizer

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        contiguous = torch.contiguous_format
        return torch.cat([self.whole.encode(image.clone(memory_format=contiguous)) for image in images.split(1)])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.whole.decode(row.clone()) for row in codes.split(1)])


def measured(work: Path, name: str, size: int, batch: int, ledger: Path) -> dict[str, Any]:
    """The numbers of an export, of a tokenizer as `OneByOne`."""
    [subject] = reconstruction.open_subjects([work / name], CPU)
    if subject.tokenizer:
        subject = replace(subject, tokenizer=OneByOne(subject.tokenizer))
    return reconstruction.measure(subject, reconstruction.open_images(work / "valid", size, None, batch, ledger), CPU)


@pytest.mark.parametrize(("name", "size"), [("dvae", 32), ("small", 16)])
def test_numbers_are_those_of_a_plain_computation(work, done, tmp_path, name, size):
    tokenizer = OneByOne(export.open_tokenizer(work / name / "export"))
    images = read_all(work / "valid", size)
    codes = tokenizer.encode(images)
    decoded = tokenizer.decode(codes)
    mse = np.mean((images.numpy().astype(float) - decoded.numpy().astype(float)) ** 2)
    shares = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    entropy = -np.sum(shares * np.log2(shares))
    row, per_image = measured(work, f"{name}/export", size, 16, tmp_path / "ledger.jsonl"), (size // 4) ** 2
    assert row["psnr_db"] == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-9)
    assert row["ssim"] == pytest.approx(float(ssim(decoded, images).mean()), rel=1e-9)
    assert len(shares) > 5 and row["codes_used"] == len(shares) and row["codes_used_share"] == len(shares) / 64
    assert row["perplexity"] == pytest.approx(2**entropy) and row["entropy_bits"] == pytest.approx(per_image * entropy)
    assert (row["codes"], row["vocab"], row["bits"], row["image_size"]) == (per_image, 64, per_image * 6, size)
    assert (row["samples"], row["samples_lost"], row["stage"]) == (44, 1, "dvae")
    assert "dvae_psnr_db" not in row, "measured by the table itself"
    # the program gives the tokenizer whole batches, where one code of 44 x 4 x 4 may be another
    told = numbers(done)[name]
    assert told.keys() == row.keys() | {"name", "export"}
    for key in ("psnr_db", "ssim", "perplexity", "entropy_bits"):
        assert told[key] == pytest.approx(row[key], rel=0.01)


def test_precision_is_recorded(work, done, monkeypatch):
    monkeypatch.setattr(precision, "choose", lambda nets, device: precision.Choice("bf16", ""))
    out, options = work / "short", ("--batch-size", 16, "--dtype", "auto", work / "dvae/export")
    assert run("--data", work / "valid", "--out", out, *options)[0] == 0
    exact, short = numbers(done)["dvae"], numbers(out)["dvae"]
    assert (exact["dtype"], short["dtype"]) == ("fp32", "bf16")
    assert short["psnr_db"] == pytest.approx(exact["psnr_db"], rel=0.01) and short["psnr_db"] != exact["psnr_db"]


def test_damaged_sample_is_in_the_ledger_once(done):
    rows = [json.loads(line) for line in (done / "ledger.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [("00025", "checksum of 'png' is wrong")]


def test_psnr_in_closed_form(work):
    """Images that are wrong by the same amount everywhere, one by 3, the others by 4."""
    tally = reconstruction._Tally(Shifted(), samples=5)
    for start in (0, 3):
        places, images = torch.arange(start, start + 3), torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
        images[places == 4] += 50
        tally.add(places, {"image": images, "weight": (places < 5).float()})
    tally.join()
    got = tally.numbers(16)
    assert got["psnr_db"] == pytest.approx(10 * math.log10(255**2 / ((4 * 16 + 9) / 5)), rel=1e-12)
    assert (got["samples"], got["codes_used"], got["codes"]) == (5, 2, 1)


class Shifted:
    """Code 0 for dark images, which come back 4 too bright, code 1 for others, which come back 3 too bright."""

    vocab, grids, image_size = 8, (1,), 16

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (images[:, 0, 0, :1] > 128).long()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.where(codes == 1, 153, 104)[:, :, None, None].expand(-1, 3, 16, 16).to(torch.uint8)


def test_every_grid_has_its_own_codes(work, done):
    """The grids of `exact` are the three channels, which share no code."""
    row, bits, used = numbers(done)["exact"], 0.0, 0
    for channel in read_all(work / "valid", 24).permute(1, 0, 2, 3):
        shares = np.unique(channel.numpy(), return_counts=True)[1] / channel.numel()
        bits -= 24 * 24 * np.sum(shares * np.log2(shares))
        used += len(shares)
    assert row["entropy_bits"] == pytest.approx(bits) and row["perplexity"] == pytest.approx(
        2 ** (bits / (3 * 24 * 24))
    )
    assert row["codes_used"] == used and row["codes_used_share"] == pytest.approx(used / (3 * 256))


def test_exact_tokenizer_is_infinite_in_valid_json(done):
    row = numbers(done)["exact"]
    assert row["psnr_db"] == "inf" and float(row["psnr_db"]) == math.inf and row["ssim"] == pytest.approx(1, abs=1e-9)
    assert (row["codes"], row["bits"]) == (3 * 24 * 24, 3 * 24 * 24 * 8)
    assert "exact<b>exact</b>" in (done / "comparison.html").read_text()


def test_numbers_of_a_stage_are_taken_in(work, done):
    row = numbers(done)["bounds"]
    want = read_all(work / "valid", 16).double().mean()
    assert row["iwae_bits_per_dim"] == pytest.approx(float(want), rel=1e-9)
    assert row["support.bounds_psnr_db"] == 12.5 and "psnr_db" not in row and row["kl|nats"] == "nan"
    assert (row["samples"], row["samples_lost"], row["image_size"]) == (44, 1, 16)


def test_a_stage_may_stop_early(work, tmp_path):
    save(tmp_path / "hasty", "support.bounds", batches=1)
    [subject] = reconstruction.open_subjects([tmp_path / "hasty"], CPU)
    images = reconstruction.open_images(work / "valid", 16, None, 8, tmp_path / "ledger.jsonl")
    row = reconstruction.measure(subject, images, CPU)
    assert row["first_batch"] > 0 and row["samples"] == 44, "the rest is counted all the same"


@pytest.mark.parametrize("batch", [1, 7, 44, 64])
def test_batch_size_does_not_matter(work, tmp_path, batch):
    for name, size in (("dvae/export", 32), ("bounds", 16)):
        row, want = (measured(work, name, size, count, tmp_path / "ledger.jsonl") for count in (batch, 16))
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                assert value == pytest.approx(want[key], rel=1e-9), key
        assert (row["samples"], row["samples_lost"]) == (44, 1)


def test_samples_limits(work, tmp_path):
    """The first ones in the order of validation, whatever the batch; more than there are is all."""
    [subject] = reconstruction.open_subjects([work / "exact"], CPU)
    keys = []
    for batch in (3, 16):
        images = reconstruction.open_images(work / "valid", 24, 10, batch, tmp_path / "ledger.jsonl")
        ids = [id for _, read in images.read(CPU) for id in read["id"].tolist() if id >= 0]
        keys.append(ids)
        row = reconstruction.measure(subject, images, CPU)
        assert row["samples"] + row["samples_lost"] == images.samples == 10
    assert keys[0] == keys[1] and len(set(keys[0])) in (9, 10) and keys[0] != sorted(keys[0])
    assert reconstruction.open_images(work / "valid", 24, 999, 8, tmp_path / "ledger.jsonl").samples == 45


def test_markdown_json_and_page_agree(done):
    text, rows = (done / "comparison.md").read_text(), numbers(done)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    titles = {title: (name, form) for name, (title, form) in reconstruction.COLUMNS.items()}
    assert len(body) == 4 and all(len(row) == len(head) for row in body)
    found = set()
    for cells in body:
        row = rows[cells[0]]
        assert cells[1] == row["stage"]
        for title, cell in zip(head[2:], cells[2:], strict=True):
            name, form = titles.get(title, (title.replace("\\|", "|"), ".4f"))
            value = row.get(name)
            found.add((cells[0], name) if name in row else None)
            if isinstance(value, str) and form != "s":
                value = float(value)
            assert cell == ("–" if value is None else format(value, form))
    every = {(name, key) for name, row in rows.items() for key in row if key not in ("name", "export", "stage")}
    assert found - {None} == every, "all numbers of the JSON are in the table"
    page = (done / "comparison.html").read_text()
    in_page = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", page)]
    assert in_page == [[cell.replace("\\|", "|") for cell in row] for row in (head, *body)]


def test_protocol_is_told(work, done):
    protocol = json.loads((done / "comparison.json").read_text())["protocol"]
    assert (protocol["data_set"], protocol["split"], protocol["samples"]) == (str(work / "valid"), "valid", 45)
    assert protocol["digest"] == Manifest.open(work / "valid").digest and "centre square" in protocol["resize"]


def test_page_holds_the_images_and_nothing_from_outside(work, done):
    page = (done / "comparison.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(", page)
    cards = re.findall(r'<div class="card">(.*?)</div>', page, re.S)
    assert len(cards) == 16 or len(cards) == 15, "the damaged one may be among the first"
    originals = {image.permute(1, 2, 0).numpy().tobytes() for image in read_all(work / "valid", 32)}
    tokenizers = {name: export.open_tokenizer(work / name / "export") for name in ("dvae", "small")}
    for card in cards:
        embedded = re.findall(r"base64,([^\"]+)\" alt=\"(\w+)\"", card)
        images = {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, name in embedded}
        assert list(images) == ["original", "dvae", "small", "exact"]
        assert images["original"].tobytes() in originals
        again = torch.from_numpy(images["original"].copy()).permute(2, 0, 1)[None]
        decoded = tokenizers["dvae"].decode(tokenizers["dvae"].encode(again))[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(images["dvae"], decoded, atol=1)
        shrunk = square(decode_again(work, images["original"]), 24)
        assert np.array_equal(images["exact"], shrunk), "the same image at the other size"
    sheet = np.asarray(Image.open(done / "reconstructions_exact.png"))
    assert np.array_equal(sheet[:24, :24], sheet[24:48, :24])
    assert {path.name for path in done.glob("*.png")} == {
        f"reconstructions_{n}.png" for n in ("dvae", "small", "exact")
    }


def decode_again(work: Path, shown: np.ndarray) -> np.ndarray:
    """The full image of the data set that `shown` was made of."""
    reader = Reader(Manifest.open(work / "valid"))
    for sample in range(45):
        if sample != DAMAGED:
            pixels = decode(reader.read_image(sample))
            if np.array_equal(square(pixels, 32), shown):
                return pixels
    raise AssertionError("an image that is not in the data set")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not rendered")
def test_a_browser_draws_the_page(done, tmp_path):
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-step"
    options = [f"--{flag}" for flag in [*flags.split(), "disable-sync", "window-size=1500,2400", "hide-scrollbars"]]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    address = (done / "comparison.html").as_uri()
    subprocess.run([CHROMIUM, *options, address], check=True, capture_output=True, timeout=HANG_SECONDS)
    shown = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    pixels = {tuple(pixel) for pixel in np.unique(shown, axis=0)}
    data = re.search(r'base64,([^"]+)" alt="exact"', (done / "comparison.html").read_text())
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.group(1))))).reshape(-1, 3)
    sampled = np.mean([tuple(pixel) in pixels for pixel in image])
    assert sampled > 0.9, "the colours of an image's pixels are on the screen"


def test_short_names(tmp_path):
    def names(*folders: str) -> list[str]:
        return reconstruction.short_names([Path(folder) for folder in folders])

    assert names("runs/dvae/export", "runs/vqvae/export") == ["dvae", "vqvae"]
    assert names("/a/64/dvae/export", "/a/128/dvae/export") == ["64/dvae", "128/dvae"]
    assert names("/a/dvae", "/a/dvae/export") == ["/a/dvae", "/a/dvae/export"]
    with pytest.raises(UserError, match="named twice"):
        names("runs/dvae", "runs/other", "runs/dvae/")


def test_only_a_stage_without_codes():
    rows = [{"name": "<vae>", "export": "x", "stage": "vae", "samples": 3, "samples_lost": 0, "elbo": 1.5}]
    document = reconstruction_page.document(Path("data/valid"), Told(), rows)
    assert reconstruction_page.table(rows) == [
        ["export", "stage", "samples evaluated", "samples lost", "elbo"],
        ["<vae>", "vae", "3", "0", "1.5000"],
    ]
    page = render(reconstruction_page.page(document, {"<vae>": {}}))
    assert "Images</h2>" not in page and "&lt;vae&gt;" in page and "<vae>" not in page


class Told:
    """What a document says about the images."""

    digest, samples = "0" * 64, 3


def test_wrong_input_is_one_line(work, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    pq.write_table(manifest_table(tmp_path / "empty", {}), tmp_path / "empty" / "manifest.parquet")
    with ShardWriter(tmp_path / "texts") as writer:
        writer.add("0", {"txt": b"no image"})
    with ShardWriter(tmp_path / "broken") as writer:
        writer.add("0", {"png": b"no image"})
    save(tmp_path / "clip", "clip", **yaml.safe_load((ROOT / "configs/tiny/clip.yaml").read_text())["model"])
    save(tmp_path / "tiny", "support.exact", size=8)
    good, dvae, out = work / "valid", work / "dvae" / "export", tmp_path / "out"
    for message, options in {
        "stage 'clip' is not an image tokenizer": ("--data", good, "--out", out, tmp_path / "clip"),
        "not an export": ("--data", good, "--out", out, dvae, good),
        "did you mean": ("--data", good, "--out", out, work / "dvae"),
        "stage 'dvae' does not model codes": ("--data", good, "--out", out, dvae, "--prior", dvae),
        "smaller than the window of SSIM": ("--data", good, "--out", out, tmp_path / "tiny"),
        "named twice": ("--data", good, "--out", out, dvae, dvae),
        "holds no samples": ("--data", tmp_path / "empty", "--out", out, dvae),
        "no images in this data set; it holds: txt": ("--data", tmp_path / "texts", "--out", out, dvae),
        "none of the 1 samples can be read": ("--data", tmp_path / "broken", "--out", tmp_path / "b", dvae),
        "no such file": ("--data", tmp_path, "--out", out, dvae),
        "--limit: 0": ("--data", good, "--out", out, "--limit", 0, dvae),
        "--batch-size: 0": ("--data", good, "--out", out, "--batch-size", 0, dvae),
        "is a file": ("--data", good, "--out", tmp_path / "file", dvae),
    }.items():
        code, printed = run(*options)
        last = printed.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: ") and message in last, (message, printed)
    assert not out.exists(), "nothing is written before all is checked"
