"""build_shards.py: every kind of source gives the same samples, every row is kept or in the ledger, bytes repeat."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.programs import load_program
from support.sources import build, build_shards, content, image_file, ledger, samples, write_files, write_tar

from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError

CAPTIONS = {f"{kind}_{index}": f"a {kind} number {index}" for kind in ("cat", "dog") for index in range(6)}


IMAGES = {name: image_file(seed, kind="JPEG" if seed % 2 else "PNG") for seed, name in enumerate(CAPTIONS)}
FILES = {name: f"{name}.{'jpg' if seed % 2 else 'png'}" for seed, name in enumerate(CAPTIONS)}


EXPECTED = {CAPTIONS[name]: (IMAGES[name], "jpg" if seed % 2 else "png") for seed, name in enumerate(CAPTIONS)}


def with_texts() -> dict[str, bytes]:
    """Image and caption side by side."""
    pairs = ({FILES[name]: IMAGES[name], f"{name}.txt": CAPTIONS[name].encode()} for name in CAPTIONS)
    return {name: data for pair in pairs for name, data in pair.items()}


def jsonl(column: str = "file") -> bytes:
    rows = [{column: FILES[name], "caption": CAPTIONS[name], "extra": 1} for name in CAPTIONS]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_source(kind: str, folder: Path) -> Path:
    """The twelve samples as a source of one kind."""
    images = {FILES[name]: IMAGES[name] for name in CAPTIONS}
    if kind == "folder":
        return write_files(folder / "in", with_texts())
    if kind == "folder with captions file":
        return write_files(folder / "in", images | {"metadata.jsonl": jsonl("file_name")})
    if kind == "tar with captions file":
        return write_tar(folder / "in.tar", {f"./{name}": data for name, data in images.items()} | {
            "captions.jsonl": jsonl()})  # fmt: skip
    if kind == "webdataset":
        return write_tar(folder / "in.tar", with_texts())
    if kind == "img2dataset tars":  # several shards, captions in the json only, statistics beside them
        for shard, names in enumerate((list(CAPTIONS)[:5], list(CAPTIONS)[5:])):
            files = {}
            for name in names:
                files[FILES[name]] = IMAGES[name]
                files[f"{name}.json"] = json.dumps({"caption": CAPTIONS[name], "url": "http://x/y"}).encode()
            write_tar(folder / "in" / f"{shard:05d}.tar", files)
            (folder / "in" / f"{shard:05d}_stats.json").write_text("{}")
        return folder / "in"
    if kind == "jsonl":
        return write_files(folder, images | {"table.jsonl": jsonl("path")}) / "table.jsonl"
    if kind in ("csv", "tsv"):
        write_files(folder, images)
        with (folder / f"table.{kind}").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("filename", "text"), *((FILES[name], CAPTIONS[name]) for name in CAPTIONS)])
        return folder / f"table.{kind}"
    folder.mkdir()
    columns = {"caption": list(CAPTIONS.values())}
    if kind == "parquet of paths":
        write_files(folder / "images", images)
        columns["image_path"] = [str(folder / "images" / FILES[name]) for name in CAPTIONS]
    elif kind == "parquet of images":
        columns["image"] = [{"bytes": IMAGES[name], "path": None} for name in CAPTIONS]
    elif kind == "img2dataset files":
        write_files(folder / "00000", {f"{key:09d}.jpg": IMAGES[name] for key, name in enumerate(CAPTIONS)})
        columns |= {"url": [f"https://x/{name}" for name in CAPTIONS], "key": [f"{k:09d}" for k in range(12)]}
    path = folder / "00000.parquet"
    pq.write_table(pa.table(columns), path)
    return path


KINDS = [
    "folder", "folder with captions file", "tar with captions file", "webdataset", "img2dataset tars", "jsonl", "csv",
    "tsv", "parquet of paths", "parquet of images", "img2dataset files",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_samples(kind, tmp_path):
    build(make_source(kind, tmp_path / "source"), "--out", tmp_path / "out")
    assert samples(tmp_path / "out" / "train") == EXPECTED, "image files as they were, format by content"
    assert ledger(tmp_path / "out") == {}


def test_class_folders_and_template(tmp_path):
    tar = write_tar(
        tmp_path / "in.tar", {f"{'polar_bear' if i % 2 else 'cat'}/{i:04d}.png": image_file(i) for i in range(6)}
    )
    build(tar, "--out", tmp_path / "out", "--caption-template", "a photo of a {folder}")
    manifest = Manifest.open(tmp_path / "out" / "train")
    reader = Reader(manifest)
    for index in range(6):
        number = int(manifest.key(index).split("_")[-1][:4])
        assert reader.read(index, "png") == image_file(number)
        assert reader.read(index, "txt").decode() == f"a photo of a {'polar bear' if number % 2 else 'cat'}"


def test_building_again_gives_the_same_bytes(tmp_path):
    source = make_source("folder", tmp_path)
    options = ["--size", 8, "--valid-share", 0.4, "--samples-per-shard", 3]
    build(source, "--out", tmp_path / "a", *options)
    build(source, "--out", tmp_path / "b", *options)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with pytest.raises(UserError, match="already"):
        build(source, "--out", tmp_path / "a")
    build(source, "--out", tmp_path / "a", *options, "--overwrite")


def test_held_out_samples_stay_held_out_when_the_set_grows(tmp_path):
    build(make_source("folder", tmp_path / "big"), "--out", tmp_path / "all", "--valid-share", 0.4)
    small = make_source("folder", tmp_path / "small")
    for name in list(CAPTIONS)[::3]:
        (small / FILES[name]).unlink()
        (small / f"{name}.txt").unlink()
    build(small, "--out", tmp_path / "part", "--valid-share", 0.4)
    train, valid = (set(samples(tmp_path / "all" / split)) for split in ("train", "valid"))
    assert train | valid == set(CAPTIONS.values()) and not train & valid and len(valid) >= 2
    assert set(samples(tmp_path / "part" / "valid")) <= valid and set(samples(tmp_path / "part" / "train")) <= train


def test_every_row_is_kept_or_has_a_reason(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.open(io.BytesIO(image_file(1))).save(turned, "JPEG", exif=exif)
    good = {
        "good.png": image_file(0),
        "turned.jpg": turned.getvalue(),
        "same.png": image_file(2),
        "same.jpg": image_file(3),
    }
    bad = {
        "cut.png": (image_file(1)[:-40], "cannot decode"),
        "text.jpg": (b"<html>not found</html>", "unknown image format"),
        "scan.tiff": (image_file(1, kind="TIFF"), "unknown image format"),
        "thin.png": (image_file(1, height=5), "too small: 16 x 5"),
        "mute.png": (image_file(1), "no caption"),
        "blank.png": (image_file(1), "empty caption"),
        "latin.png": (image_file(1), "caption is not UTF-8"),
    }
    texts = {f"{name.split('.')[0]}.txt": f"caption {name}".encode() for name in good | bad if name != "mute.png"}
    texts |= {"blank.txt": b" \n", "latin.txt": b"caf\xe9", "orphan.txt": b"no image here"}
    files = good | {name: data for name, (data, _) in bad.items()} | texts
    expected = {name: reason for name, (_, reason) in bad.items()} | {"orphan.txt": "no image"}
    for kind, source in [
        ("folder", write_files(tmp_path / "in", files)),
        ("tar", write_tar(tmp_path / "in.tar", files)),
    ]:
        build(source, "--out", tmp_path / kind, "--min-side", 8)
        reasons = ledger(tmp_path / kind)
        assert reasons.keys() == expected.keys()
        assert all(expected[name] in reason for name, reason in reasons.items())
        assert Manifest.open(tmp_path / kind / "train").num_samples == len(good)


def test_resizing_is_upright_square_and_lossless_for_png(tmp_path):
    flat = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((5, 5, 1), np.uint8))
    padded = np.concatenate([flat[:, :7] * 0, flat, flat[:, :7] * 0], axis=1)  # 20 x 34
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "PNG")
    build(
        write_files(tmp_path / "in", {"x.png": file.getvalue(), "x.txt": b"x"}), "--out", tmp_path / "out", "--size", 4
    )
    data, kind = samples(tmp_path / "out" / "train")["x"]
    assert kind == "png" and np.array_equal(decode(data), flat[::5, ::5])
    assert Manifest.open(tmp_path / "out" / "train").info["size"] == 4


def test_several_captions_of_one_image_stay_on_one_side(tmp_path):
    write_files(tmp_path, {f"{index}.png": image_file(index) for index in range(8)})
    rows = [{"path": f"{index}.png", "caption": f"{index} told {way}"} for way in range(5) for index in range(8)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(tmp_path / "table.jsonl", "--out", tmp_path / "out", "--valid-share", 0.5)
    sides = {}
    for split in ("train", "valid"):
        for caption in samples(tmp_path / "out" / split):
            sides.setdefault(caption.split()[0], set()).add(split)
    assert len(sides) == 8 and all(len(side) == 1 for side in sides.values())
    assert sum(Manifest.open(tmp_path / "out" / split).num_samples for split in ("train", "valid")) == 40


def test_all_captions_of_a_captions_file_are_kept(tmp_path):
    rows = [{"file": "A.PNG", "caption": f"way {way}"} for way in range(3)] + [{"file": "gone.png", "caption": "x"}]
    lines = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    write_files(tmp_path / "in", {"A.PNG": image_file(0), "A.txt": b"not this", "captions.jsonl": lines})
    build(tmp_path / "in", "--out", tmp_path / "out")
    assert samples(tmp_path / "out" / "train") == {f"way {way}": (image_file(0), "png") for way in range(3)}
    assert ledger(tmp_path / "out") == {"gone.png": "no image"}


def test_hostile_names_and_links_do_not_leave_the_folder(tmp_path):
    names = ["../../up.png", "/abs.png", "a b/c.d.png", "ключ.png", "a.b.png", "a_b.png"]
    path = tmp_path / "in.tar"
    write_tar(path, {name: image_file(index) for index, name in enumerate(names)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    build(path, "--out", tmp_path / "deep" / "out", "--caption-template", "x")
    manifest = Manifest.open(tmp_path / "deep" / "out" / "train")
    assert manifest.num_samples == len(names)
    reader = Reader(manifest)
    assert [reader.read(index, "png") for index in range(6)] == [image_file(index) for index in range(6)]
    assert ledger(tmp_path / "deep" / "out") == {"link.png": "not a regular file"}
    assert {path.name for path in tmp_path.iterdir()} == {"in.tar", "deep"}


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    folder = write_files(tmp_path / "in", {"good.png": image_file(0), "good.txt": b"good"})
    odd = os.fsencode(folder) + b"/caf\xe9"
    for ending, data in ((b".png", image_file(1)), (b".txt", b"odd")):
        with open(odd + ending, "wb") as file:
            file.write(data)
    build(folder, "--out", tmp_path / "out")
    assert samples(tmp_path / "out" / "train") == {"good": (image_file(0), "png"), "odd": (image_file(1), "png")}


def test_filters_of_the_command_line(tmp_path):
    rows = [
        {"path": "a.png", "caption": "a red fox in the snow", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
        {"path": "a.png", "caption": "a fox", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
        {"path": "a.png", "caption": "Photographed on May 12, 2007", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
        {"path": "a.png", "caption": "ein roter Fuchs im tiefen Schnee", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
        {"path": "wide.png", "caption": "a red fox in the snow", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
        {"path": "a.png", "caption": "a red fox in the snow", "pwatermark": 0.9, "NSFW": "UNLIKELY"},
        {"path": "a.png", "caption": "a red fox in the snow", "pwatermark": 0.1, "NSFW": "NSFW"},
        {"path": "a.png", "caption": "a red fox in the snow", "NSFW": "UNLIKELY"},
        {"path": "b.png", "caption": "the same red fox, again", "pwatermark": 0.1, "NSFW": "UNLIKELY"},
    ]
    write_files(
        tmp_path, {"a.png": image_file(0), "b.png": image_file(0), "wide.png": image_file(1, height=8, width=20)}
    )
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--preset=dalle", "--max-watermark=0.5", "--max-nsfw=0.4", "--dedupe=exact"]
    build(tmp_path / "table.jsonl", "--out", tmp_path / "out", *options)
    table = pq.read_table(tmp_path / "out" / "rows" / "000000.parquet").to_pylist()
    assert [row["status"].split(":")[0] for row in table] == [
        "kept", "caption too short", "caption is boilerplate", "caption in another language", "aspect ratio",
        "watermark score", "NSFW score", "no watermark score", "duplicate of 0",
    ]  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows"], report["kept"], sum(report["left_out"].values())) == (9, 1, 8)
    build(tmp_path / "table.jsonl", "--out", tmp_path / "most", "--preset=dalle", "--no-boilerplate", "--max-aspect=3")
    assert json.loads((tmp_path / "most" / "report.json").read_text())["kept"] == 7
    for option, message in {
        "--max-nsfw=2": "a probability",
        "--max-aspect=0.5": "at least 1",
        "--near-bits=3": "only with --dedupe near",
        "--workers=0": "at least 1",
    }.items():
        with pytest.raises(UserError, match=message):
            build_shards.main([str(tmp_path / "table.jsonl"), f"--out={tmp_path / 'x'}", option])


def test_damage_to_a_tar_is_a_line_of_the_ledger(tmp_path):
    source = make_source("webdataset", tmp_path)
    sound = source.read_bytes()
    with tarfile.open(source) as tar:
        members = tar.getmembers()
    middle = members[10]
    flipped = bytearray(sound)
    flipped[middle.offset + 3] ^= 1  # in a header: tarfile would end here without a word
    cut = sound[: middle.offset_data + 5]
    boundary = sound[: middle.offset]
    for name, data in {"flipped": bytes(flipped), "cut": cut, "boundary": boundary}.items():
        source.write_bytes(data)
        build(source, "--out", tmp_path / name)
        kept = samples(tmp_path / name / "train")
        assert 0 < len(kept) < len(CAPTIONS) and all(EXPECTED[caption] == kept[caption] for caption in kept)
        assert "tar is damaged or cut off" in ledger(tmp_path / name)["in.tar"]


def test_wrong_sources_get_one_line(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 200)
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    (tmp_path / "x.jsonl").write_text('{"path": "a.png", "caption": "b"}\nnot json\n')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere": "no such file",
        "x.zip": "not a source",
        "x.tar": "not an uncompressed tar",
        "x.parquet": "not a parquet file",
        "x.jsonl": "not a table of rows",
        "empty": "no samples",
    }.items():
        with pytest.raises(UserError, match=message):
            build(tmp_path / name, "--out", tmp_path / "out", "--overwrite")
        assert not (tmp_path / "out" / "train" / "manifest.parquet").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_the_caption_tokenizer_is_the_same_on_every_run(tmp_path, capsys):
    train_tokenizer = load_program("train_tokenizer")
    build(make_source("folder", tmp_path), "--out", tmp_path / "data")
    for name in ("a", "b"):
        train_tokenizer.main([f"--data={tmp_path / 'data/train'}", f"--out={tmp_path / name}", "--vocab=290"])
    assert (tmp_path / "a/text.model").read_bytes() == (tmp_path / "b/text.model").read_bytes()
    assert "290 tokens; 12 captions" in capsys.readouterr().out
    from dalle_scale.data.text import open_text

    tokenizer = open_text(tmp_path / "a/text.model")
    assert tokenizer.vocab == 290 and tokenizer.can_drop
    assert tokenizer.pieces("A CAT") == tokenizer.pieces("a cat")
    assert tokenizer.decode(tokenizer.encode(["日本 a dog"], 32)[0]) == "日本 a dog"
    some = list(train_tokenizer.read_captions(tmp_path / "data/train", limit=5))
    assert len(some) == 5 and set(some) <= set(CAPTIONS.values())
    for vocab, message in ((100, "Vocabulary size"), (100_000, "Vocabulary size too high")):
        with pytest.raises(UserError, match=message):
            train_tokenizer.main([f"--data={tmp_path / 'data/train'}", f"--out={tmp_path / 'c'}", f"--vocab={vocab}"])
