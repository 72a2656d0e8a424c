"""inspect_shards.py: the sheet shows each sample's image, caption and place, or why it cannot be read."""

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.exports import save_tokenizer
from support.programs import load_program
from support.sources import image_file

from dalle_scale.checkpoint.export import open_tokenizer
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data import codes
from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.types import UserError

inspect_shards = load_program("inspect_shards")
DAMAGED, FLIPPED, NOT_UTF_8, EMPTY, HOSTILE = 7, 13, 17, 19, 23
CAPTIONS = {DAMAGED: b"a damaged one", NOT_UTF_8: b"\xff\xfe", EMPTY: b" ", HOSTILE: b"<script>alert(1)</script> & co"}


def caption_of(number: int) -> bytes:
    return CAPTIONS.get(number, f"A {'Cat' if number % 5 == 0 else 'dog'} of number {number}".encode())


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    """40 images of 16 x 12 in shards of 10."""
    folder = tmp_path_factory.mktemp("inspect") / "images"
    with ShardWriter(folder, 10) as writer:
        for number in range(40):
            image = b"\x89PNG\r\n\x1a\n and no more" if number == DAMAGED else image_file(number)
            writer.add(f"{number:02d}", {"png": image, "txt": caption_of(number)})
    entry = Manifest.open(folder).entry(FLIPPED, "png")
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(entry.offset + 50)
        file.write(b"!!")
    return folder


def inspect(folder: Path, out: Path, *options: str) -> list[tuple[str, list[np.ndarray], list[str]]]:
    """Caption, images and notes of every card of the page."""
    inspect_shards.main([f"--data={folder}", f"--out={out}", *options])
    assert Image.open(out / "sheet.png").size > (100, 100)
    cards = []
    for card in (out / "sheet.html").read_text(encoding="utf-8").split('<div class="card">')[1:]:
        images = re.findall(r'src="data:image/png;base64,([^"]+)"', card)
        pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in images]
        notes = [html.unescape(note) for note in re.findall(r"<b>(.*?)</b>", card)]
        cards.append((html.unescape(re.search(r'<p class="caption">(.*?)</p>', card)[1]), pixels, notes))
    return cards


def key_of(card) -> str:
    return card[2][0].split(" ")[0]


def test_every_sample_is_shown_with_its_own_image(data_set, tmp_path):
    cards = inspect(data_set, tmp_path / "sheet", "--limit=100")
    assert [key_of(card) for card in cards] == [f"{number:02d}" for number in range(40)]
    for number, (caption, [pixels], [note]) in enumerate(cards):
        assert f"shard-{number // 10:06d}" in note
        if number not in (DAMAGED, FLIPPED):
            data = image_file(number)
            assert np.array_equal(pixels, decode(data))
            assert f"16 x 12 · {len(data):,} bytes" in note
        if number not in (NOT_UTF_8, EMPTY):
            assert caption == caption_of(number).decode()
    page = (tmp_path / "sheet" / "sheet.html").read_text()
    assert "<script" not in page and not re.search(r"https?:|<link|url\(", page)


def test_what_cannot_be_read_is_shown_with_its_reason(data_set, tmp_path, capsys):
    keys = ",".join(f"{number:02d}" for number in (FLIPPED, DAMAGED, NOT_UTF_8, EMPTY))
    flipped, damaged, not_utf_8, empty = inspect(data_set, tmp_path / "sheet", f"--keys={keys}")
    assert flipped[2] == ["13 · shard-000001 · cannot be read: checksum of 'png' is wrong"]
    assert re.search(r"cannot be read: cannot decode: \w+", damaged[2][0]) and damaged[0] == "a damaged one"
    assert np.array_equal(flipped[1][0], damaged[1][0]), "one placeholder for all"
    assert not np.array_equal(flipped[1][0], decode(image_file(FLIPPED)))
    assert not_utf_8[0] == "(caption cannot be read: it is not UTF-8)"
    assert np.array_equal(not_utf_8[1][0], decode(image_file(NOT_UTF_8)))
    assert empty[0] == "(empty caption)"
    assert "4 samples, 3 of them cannot be read" in capsys.readouterr().out


def test_the_choice_repeats_and_follows_the_seed(data_set, tmp_path):
    first = [key_of(card) for card in inspect(data_set, tmp_path / "a", "--limit=8")]
    assert len(set(first)) == 8
    inspect(data_set, tmp_path / "b", "--limit=8")
    for ending in ("html", "png"):
        assert (tmp_path / f"a/sheet.{ending}").read_bytes() == (tmp_path / f"b/sheet.{ending}").read_bytes()
    assert [key_of(card) for card in inspect(data_set, tmp_path / "a", "--limit=8", "--seed=1")] != first


def test_keys_come_in_the_order_asked_for(data_set, tmp_path):
    cards = inspect(data_set, tmp_path / "sheet", "--keys=31,02,15,02")
    assert [key_of(card) for card in cards] == ["31", "02", "15"]
    with pytest.raises(UserError, match=r"no sample with the key 'x' \(1 of"):
        inspect(data_set, tmp_path / "sheet", "--keys=31,x")


def test_matching_captions_are_all_found(data_set, tmp_path):
    expected = [f"{number:02d}" for number in range(40) if b"cat" in caption_of(number).lower()]
    assert [key_of(card) for card in inspect(data_set, tmp_path / "sheet", "--match=cAt")] == expected
    some = [
        [key_of(c) for c in inspect(data_set, tmp_path / "s", "--match=cat", "--limit=3", f"--seed={s}")]
        for s in (0, 1)
    ]
    assert some[0] != some[1] and all(len(keys) == 3 and set(keys) <= set(expected) for keys in some)
    with pytest.raises(UserError, match="no caption that can be read holds 'zebra'"):
        inspect(data_set, tmp_path / "sheet", "--match=zebra")


def test_large_images_are_shrunk_whole(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.add("a", {"png": image_file(0, 300, 600), "txt": b"word " * 1000})
    [(caption, [pixels], [note])] = inspect(tmp_path / "set", tmp_path / "sheet")
    assert pixels.shape == (128, 256, 3) and "600 x 300" in note
    assert len(caption) < 500 and caption.endswith("… (4,999 characters)")


# ---- codes ----


@pytest.fixture(scope="module")
def coded(tmp_path_factory) -> Path:
    """`tokenizer`, and `codes`: twelve samples of its codes, number 5 with one too few."""
    folder = tmp_path_factory.mktemp("coded")
    save_tokenizer(folder / "tokenizer", seed=0)
    with ShardWriter(folder / "codes", info={"kind": "codes", "vocab": 64, "grids": [8]}) as writer:
        for number in range(12):
            packed = codes.pack(np.random.default_rng(number).integers(0, 64, 64 - (number == 5)))
            writer.add(f"{number:02d}", {"codes": packed, "png": image_file(number), "txt": b"caption"})
    return folder


def test_codes_are_shown_as_the_tokenizer_decodes_them(coded, tmp_path):
    cards = inspect(coded / "codes", tmp_path / "sheet", f"--tokenizer={coded / 'tokenizer'}")
    tokenizer = open_tokenizer(coded / "tokenizer")
    assert len(cards) == 12
    for number, (_, [original, decoded], [_, note]) in enumerate(cards):
        assert np.array_equal(original, decode(image_file(number)))
        if number == 5:
            assert note.endswith("cannot be read: 63 codes instead of 64")
            continue
        values = np.random.default_rng(number).integers(0, 64, 64)
        with torch.inference_mode():
            expected = tokenizer.decode(torch.from_numpy(values)[None])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(decoded, expected)
        assert f"8 x 8 codes · {len(np.unique(values))} distinct" in note


def test_wrong_input_is_one_line(data_set, coded, tmp_path):
    tokenizer = f"--tokenizer={coded / 'tokenizer'}"
    with pytest.raises(UserError, match="at least 1"):
        inspect(data_set, tmp_path / "sheet", "--limit=0")
    with pytest.raises(UserError, match="give one of them"):
        inspect(data_set, tmp_path / "sheet", "--keys=a", "--match=b")
    with pytest.raises(UserError, match="holds no codes"):
        inspect(data_set, tmp_path / "sheet", tokenizer)
    for name, info in (("other", {"vocab": 65}), ("large", {"grids": [16]})):
        with ShardWriter(tmp_path / name, info=info) as writer:
            writer.add("a", {"codes": b"12"})
        with pytest.raises(UserError, match="give the tokenizer they were made with"):
            inspect(tmp_path / name, tmp_path / "sheet", tokenizer)
        with pytest.raises(UserError, match="give --tokenizer EXPORT"):
            inspect(tmp_path / name, tmp_path / "sheet")
    with ShardWriter(tmp_path / "texts") as writer:
        writer.add("a", {"txt": b"12"})
    with pytest.raises(UserError, match="nothing to show"):
        inspect(tmp_path / "texts", tmp_path / "sheet")
    assert not list(tmp_path.glob("sheet/*"))
