"""describe_shards.py: its numbers are those of an independent count, whatever the number of workers; the page stands
alone."""

import io
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.processes import HANG_SECONDS
from support.programs import load_program

from dalle_scale.curation import statistics
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.curation.statistics import Distribution, Repeats, image_header
from dalle_scale.data import codes
from dalle_scale.data.decode import BadSample, decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.types import UserError

describe_shards = load_program("describe_shards")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
SAMPLES, VOCAB, GRID = 180, 50, 4
NOT_UTF_8, EMPTY, CUT, NO_FORMAT, WRONG_CODES, FLIPPED = 11, (20, 21), 30, 40, 50, 75


def image_file(seed: int, width: int, height: int, kind: str, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"exif": exif} if orientation != 1 else {}
    Image.fromarray(pixels).save(file, KINDS[kind], **options)
    return file.getvalue()


def make(number: int) -> dict[str, bytes]:
    """The members of one sample: five formats, turned images, captions that repeat, among them bad ones."""
    rng = random.Random(number)
    kind = list(KINDS)[number % 5]
    turned = kind == "jpg" and number % 2 == 0
    image = image_file(number, rng.randint(3, 70), rng.randint(3, 70), kind, 6 if turned else 1)
    caption = f"Caption number {number} of a cat's day" if number % 3 else f"a dog of kind {number % 7}"
    text = b"\xff\xfe" if number == NOT_UTF_8 else b" \n" if number in EMPTY else caption.encode()
    if number in (CUT, NO_FORMAT):
        image = b"\xff\xd8\xff and no more" if number == CUT else b"no image at all"
    values = np.random.default_rng(number).integers(0, VOCAB - 5, GRID * GRID)
    packed = codes.pack(values)[: 6 if number == WRONG_CODES else None]
    return {kind: image, "txt": text, "codes": packed}


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("describe") / "images"
    with ShardWriter(folder, 50, info={"kind": "images", "vocab": VOCAB, "grids": [GRID]}) as writer:
        for number in range(SAMPLES):
            writer.add(f"{number:05d}", make(number))
    entry = Manifest.open(folder).entry(FLIPPED, list(KINDS)[FLIPPED % 5])
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(entry.offset + 5)
        file.write(b"!")
    return folder


def describe(folder: Path, out: Path, *options: str) -> dict:
    describe_shards.main([f"--data={folder}", f"--out={out}", "--workers=1", *options])
    return json.loads((out / "stats.json").read_text())


@pytest.fixture(scope="module")
def numbers(data_set, tmp_path_factory) -> dict:
    return describe(data_set, tmp_path_factory.mktemp("out"))


GOOD_IMAGES = [number for number in range(SAMPLES) if number not in (CUT, NO_FORMAT, FLIPPED)]
GOOD_CAPTIONS = [number for number in range(SAMPLES) if number != NOT_UTF_8 and number not in EMPTY]


def test_every_sample_is_readable_or_has_one_reason(numbers):
    assert numbers["samples"] == SAMPLES and numbers["shards"] == 4
    assert numbers["unreadable"] == {
        "the caption is not UTF-8": 1,
        "cannot decode": 1,
        "unknown image format": 1,
        "# codes instead of #": 1,
        "checksum of 'jpg' is wrong": 1,
    }
    assert numbers["readable"] == SAMPLES - 5
    found = {row["key"]: (row["shard"], row["reason"]) for row in numbers["unreadable_examples"]}
    assert sorted(map(int, found)) == sorted([NOT_UTF_8, CUT, NO_FORMAT, WRONG_CODES, FLIPPED])
    assert found[f"{FLIPPED:05d}"] == ("shard-000001.tar", "checksum of 'jpg' is wrong")
    assert found[f"{WRONG_CODES:05d}"][1] == "3 codes instead of 16"


def test_images_are_counted_as_decoding_them_shows(numbers):
    images = [next(data for kind, data in make(number).items() if kind in KINDS) for number in GOOD_IMAGES]
    shapes = [decode(data).shape for data in images]
    found = numbers["images"]
    assert found["formats"] == Counter(list(KINDS)[number % 5] for number in GOOD_IMAGES)
    expected = {
        "width": [shape[1] for shape in shapes],
        "height": [shape[0] for shape in shapes],
        "aspect_ratio": [shape[1] / shape[0] for shape in shapes],
        "megapixels": [shape[1] * shape[0] / 1e6 for shape in shapes],
        "bytes_per_pixel": [len(d) / (s[0] * s[1]) for d, s in zip(images, shapes, strict=True)],
    }
    for name, values in expected.items():
        assert found[name]["count"] == len(values) == sum(count for *_, count in found[name]["bins"])
        for key, value in (("min", min(values)), ("mean", np.mean(values)), ("max", max(values))):
            assert found[name][key] == pytest.approx(value, abs=1e-6)
        for low, below, count in found[name]["bins"]:
            inside = sum(low <= value < below for value in values)
            assert inside == pytest.approx(count, abs=1), "a value on an edge may fall to either side"


def test_captions_are_counted_as_splitting_them_shows(numbers):
    captions = [make(number)["txt"].decode() for number in GOOD_CAPTIONS]
    found = numbers["captions"]
    assert found["empty"] == len(EMPTY)
    for name, lengths in (("characters", list(map(len, captions))), ("words", [c.count(" ") + 1 for c in captions])):
        assert (found[name]["count"], found[name]["max"]) == (len(lengths), max(lengths))
        assert found[name]["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
        assert found[name]["mean"] == pytest.approx(np.mean(lengths), abs=1e-6)
        assert sum(count for *_, count in found[name]["bins"]) == len(lengths)
    assert found["repeated_share"] == pytest.approx(1 - len(set(captions)) / len(captions), abs=1e-6)
    assert not found["repeated_is_estimate"]
    words = Counter(word for caption in captions for word in caption.lower().split())
    assert found["words_from_samples"] == len(captions)
    assert found["frequent_words"]["cat's"] == words["cat's"] > 0
    assert max(found["frequent_words"].values()) == max(words.values())
    assert sum(found["languages"].values()) == len(captions)


def test_codes_are_counted_as_joining_them_shows(numbers):
    values = [np.frombuffer(make(number)["codes"], "<u2") for number in range(SAMPLES) if number != WRONG_CODES]
    counts = np.bincount(np.concatenate(values))
    shares = counts[counts > 0] / counts.sum()
    found = numbers["codes"]
    assert found["counts"] == counts.tolist() and found["vocab"] == VOCAB
    assert found["used"] == len(shares)
    assert found["perplexity"] == pytest.approx(math.prod(p**-p for p in shares.tolist()), abs=1e-3)
    in_bins = sum((below - first) * mean for first, below, mean in found["mean_uses_by_rank"])
    assert in_bins == pytest.approx(counts.sum(), rel=1e-3)


def test_bytes_are_those_of_the_files(numbers, data_set):
    assert numbers["bytes"] == sum(path.stat().st_size for path in data_set.glob("*.tar"))
    texts = [len(make(number)["txt"]) for number in range(SAMPLES)]
    assert numbers["members"]["txt"] == {"samples": SAMPLES, "bytes": sum(texts)}


def test_workers_change_no_byte(data_set, tmp_path):
    pages = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        found = describe(data_set, out, f"--workers={workers}", "--limit=60")
        assert 20 < found["captions"]["words_from_samples"] < 120, "some third of the captions, by hash"
        pages.append(tuple((out / name).read_bytes() for name in ("stats.html", "stats.json")))
    assert pages[0] == pages[1]


def test_tokens_are_the_tokenizers(data_set, tmp_path):
    captions = [make(number)["txt"].decode() for number in GOOD_CAPTIONS]
    (tmp_path / "captions").write_text("\n".join(captions))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions"), model_prefix=str(tmp_path / "text"), vocab_size=45, minloglevel=2
    )
    found = describe(data_set, tmp_path / "page", f"--text-tokenizer={tmp_path / 'text.model'}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "text.model"))
    lengths = [len(model.encode(caption)) for caption in captions]
    assert found["captions"]["tokens"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-6)
    assert found["captions"]["tokens"]["max"] == max(lengths)


def test_languages_are_told(tmp_path):
    english = "the children are playing with their dog in the garden behind the old house"
    german = "die Kinder spielen mit ihrem Hund im Garten hinter dem alten Haus und lachen"
    with ShardWriter(tmp_path / "set") as writer:
        for number in range(12):
            writer.add(str(number), {"txt": (german if number < 3 else english).encode()})
    found = describe(tmp_path / "set", tmp_path / "page")
    assert found["captions"]["languages"] == {"en": 9, "de": 3}
    assert "images" not in found and "codes" not in found


# ---- the page ----


def test_page_stands_alone_and_its_plots_are_well_formed(data_set, numbers, tmp_path):
    describe(data_set, tmp_path / "page")
    page = (tmp_path / "page" / "stats.html").read_text()
    assert not re.search(r"https?:|<script|<link|url\(|@import|<img|<iframe", page)
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) == 1 + 5 + 2 + 2 + 1  # formats, images, captions, languages and words, codes
    for plot in plots:
        tree = ElementTree.fromstring(plot)
        bars = [node for node in tree.iter("rect") if node.get("class") == "bar"]
        assert bars and len(bars) == len(list(tree.iter("title"))) == len(list(tree.iter("g")))
        assert all(float(bar.get("height")) >= 0 and float(bar.get("width")) > 0 for bar in bars)
    width = ElementTree.fromstring(plots[1])
    counts = [int(re.search(r": ([\d,]+) samples", title.text)[1].replace(",", "")) for title in width.iter("title")]
    assert counts == [count for *_, count in numbers["images"]["width"]["bins"]]
    heights = [float(node.get("height")) for node in width.iter("rect") if node.get("class") == "bar"]
    assert np.corrcoef(counts, heights)[0, 1] > 0.9999
    assert f"{SAMPLES}</b><span>samples" in page and "5</b><span>samples cannot be read" in page


def test_text_of_the_data_is_escaped(tmp_path):
    info = {"kind": "<script>alert(1)</script>"}
    with ShardWriter(tmp_path / "<b>set", info=info) as writer:
        writer.add("a", {"txt": b"<script>alert(2)</script>"})
    describe(tmp_path / "<b>set", tmp_path / "page")
    page = (tmp_path / "page" / "stats.html").read_text()
    assert "<script" not in page and "<b>set" not in page and "&lt;script&gt;alert(1)" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not rendered")
def test_a_browser_draws_the_bars(data_set, tmp_path):
    describe(data_set, tmp_path / "page")
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-step"
    options = [f"--{flag}" for flag in [*flags.split(), "disable-sync", "window-size=1400,2600", "hide-scrollbars"]]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    address = (tmp_path / "page" / "stats.html").as_uri()
    subprocess.run([CHROMIUM, *options, address], check=True, capture_output=True, timeout=HANG_SECONDS)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    blue = (pixels[:, :, 2] > pixels[:, :, 0] + 100).mean()
    assert 0.005 < blue < 0.5, "bars are there, and are not everything"


# ---- what the numbers are made of ----


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    kind=st.sampled_from(list(KINDS)),
    orientation=st.integers(1, 8),
)
def test_header_says_what_decoding_shows(width, height, kind, orientation):
    data = image_file(0, width, height, kind, orientation if kind in ("jpg", "png", "webp") else 1)
    shape = decode(data).shape
    assert image_header(data) == (kind, shape[1], shape[0])


def test_nothing_but_the_header_is_looked_at():
    for kind in ("jpg", "png", "bmp"):
        data = image_file(0, 64, 48, kind)
        half = data[: len(data) // 2]
        with pytest.raises(BadSample):
            decode(half)
        assert image_header(half) == (kind, 64, 48)
    file = io.BytesIO()
    Image.new("1", (12_000, 6_000)).save(file, "PNG")
    with pytest.raises(BadSample, match="too many pixels: 12000 x 6000"):
        image_header(file.getvalue())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1), st.floats(0.001, 1))
def test_quantiles_of_whole_numbers_are_exact(values, share):
    found = Distribution()
    for value in values:
        found.add(value)
    assert found.quantile(share) == np.quantile(values, share, method="inverted_cdf")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1), st.floats(0.001, 1))
def test_quantiles_of_ratios_are_right_to_half_a_bin(values, share):
    parts = [Distribution(is_ratio=True) for _ in range(3)]
    for number, value in enumerate(values):
        parts[number % 3].add(value)
    for part in parts[1:]:
        parts[0].merge(part)
    exact = np.quantile(values, share, method="inverted_cdf")
    assert abs(math.log2(parts[0].quantile(share) / exact)) <= 0.5 / statistics.PER_OCTAVE + 1e-9
    assert sum(count for *_, count in describe_shards.ratio_bins(parts[0])) == len(values)
    assert len(describe_shards.ratio_bins(parts[0])) <= describe_shards.BARS + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=200), st.randoms(use_true_random=False))
def test_repeats_do_not_depend_on_order_or_parts(values, shuffler):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "DISTINCT_CAPTIONS", 8)
        whole, parts = Repeats(), [Repeats() for _ in range(3)]
        for value in values:
            whole.add(f"caption {value}")
        for value in shuffler.sample(values, len(values)):
            parts[shuffler.randrange(3)].add(f"caption {value}")
        for part in parts[1:]:
            parts[0].merge(part)
    assert parts[0] == whole and len(whole.seen) <= 8
    counts = Counter(f"caption {value}" for value in values)
    assert all(whole.seen.get(statistics._hash(text), count) == count for text, count in counts.items())
    if len(counts) <= 8:
        assert sorted(whole.seen.values()) == sorted(counts.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1))
def test_bins_of_lengths_hold_every_value(values):
    found = Distribution()
    for value in values:
        found.add(value)
    bins = describe_shards.length_bins(found)
    assert sum(count for *_, count in bins) == len(values) and len(bins) <= describe_shards.BARS + 1
    assert all(count == sum(low <= value < below for value in values) for low, below, count in bins)


def test_wrong_input_is_one_line(data_set, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        describe(data_set, tmp_path / "page", "--limit=0")
    with pytest.raises(UserError, match="no such file"):
        describe(tmp_path / "nowhere", tmp_path / "page")
    with pytest.raises(UserError, match="no such text tokenizer"):
        describe(data_set, tmp_path / "page", "--text-tokenizer=/nowhere/text.model")
    assert not (tmp_path / "page").exists()
