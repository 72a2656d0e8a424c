"""launch/encode.py: codes are those of the tokenizer, captions stay with them, ranks and restarts change no byte."""

import io
import json
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exports import save_tokenizer
from support.processes import ROOT, Launch, run_until
from support.runs import write_images

from dalle_scale.checkpoint import export
from dalle_scale.curation import shard_writer
from dalle_scale.curation.encode import encode_shards
from dalle_scale.data.decode import decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.data.transforms import square
from dalle_scale.nn import precision

PROGRAM = ROOT / "launch" / "encode.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images`: 45 images in three shards, one of them damaged; `dvae` and `other`: tokenizers."""
    folder = tmp_path_factory.mktemp("encode")
    write_images(folder / "images", 45, size=40)
    manifest = Manifest.open(folder / "images")
    with (folder / "images" / "shard-000001.tar").open("r+b") as file:
        file.seek(int(manifest.entry(25, "png").offset) + 20)
        file.write(b"damage")
    save_tokenizer(folder / "dvae", seed=0)
    save_tokenizer(folder / "other", seed=1)
    return folder


def run(work: Path, out: str, tokenizer: str = "dvae", *more: str) -> tuple[int, str]:
    """The program in this process: exit code, everything it printed."""
    options = [f"--tokenizer={work / tokenizer}", f"--data={work / 'images'}", f"--out={work / out}", "--batch-size=8"]
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(printed),
        redirect_stderr(printed),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, "argv", [str(PROGRAM), *options, *more])
        runpy.run_path(str(PROGRAM), run_name="__main__")
    return int(end.value.code or 0), printed.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(work: Path) -> Path:
    code, printed = run(work, "codes")
    assert code == 0 and "44 samples of 8 x 8 codes" in printed and "left out: 1" in printed
    return work / "codes"


def test_codes_are_the_tokenizers_and_captions_stay(work, done):
    images, coded = Manifest.open(work / "images"), Manifest.open(done)
    tokenizer = export.open_tokenizer(work / "dvae")
    assert (coded.info["kind"], coded.info["vocab"], coded.info["grids"]) == ("codes", 64, [8])
    assert [shard.samples for shard in coded.shards] == [20, 19, 5]
    good = [sample for sample in range(45) if sample != 25]
    assert [coded.key(row) for row in range(44)] == [images.key(sample) for sample in good]
    image_reader, code_reader = Reader(images), Reader(coded)
    squares = np.stack([square(decode(image_reader.read_image(sample)), 32) for sample in good])
    expected = tokenizer.encode(torch.from_numpy(squares).permute(0, 3, 1, 2)).numpy()
    written = np.stack([np.frombuffer(code_reader.read(row, "codes"), "<u2") for row in range(44)])
    assert len(np.unique(expected)) > 5
    assert (written == expected).mean() > 0.99, "a batch of another size may turn a tie"
    for row, sample in enumerate(good):
        assert code_reader.read(row, "txt") == image_reader.read(sample, "txt")
    rows = [json.loads(line) for line in (done / "ledger.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in rows] == [("00025", "checksum of 'png' is wrong")]


def test_precision_is_recorded(work, done, monkeypatch):
    """What auto became; the same command continues in it, where the machine would choose otherwise too."""
    assert "dtype" not in Manifest.open(done).info
    chosen = iter(("bf16", "fp32"))
    monkeypatch.setattr(precision, "choose", lambda nets, device: precision.Choice(next(chosen), ""))
    assert run(work, "auto", "dvae", "--dtype=auto")[0] == 0
    assert Manifest.open(work / "auto").info == {**Manifest.open(done).info, "dtype": "bf16"}
    exact, short = (Reader(Manifest.open(folder)) for folder in (done, work / "auto"))
    pairs = [[np.frombuffer(reader.read(row, "codes"), "<u2") for row in range(44)] for reader in (exact, short)]
    assert (np.stack(pairs[0]) == np.stack(pairs[1])).mean() > 0.8, "logits of random weights are close together"
    assert "complete already" in run(work, "auto", "dvae", "--dtype=auto")[1]
    assert run(work, "auto", "dvae", "--dtype=fp32")[0] == 2
    assert run(work, "auto_32", "dvae", "--dtype=auto")[0] == 0
    assert content(work / "auto_32") == content(done)


def test_two_ranks_write_the_same_files(work, done, launch: Launch):
    options = [f"--tokenizer={work / 'dvae'}", f"--data={work / 'images'}", f"--out={work / 'ranks'}", "--batch-size=8"]
    result = launch(PROGRAM, *options, processes=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert content(work / "ranks") == content(done)


def test_goes_on_where_it_was_cut_off(work, done):
    out, info = work / "cut", Manifest.open(done).info
    tokenizer = export.open_tokenizer(work / "dvae")
    encode_shards(Manifest.open(work / "images"), out, 32, tokenizer.encode, 8, rank=0, world_size=2)
    (out / "unfinished.json").write_text(json.dumps(info))
    (out / ".shard-000001.tar.tmp").write_bytes(b"half a shard")
    before = {number: (out / shard_writer.shard_name(number)).stat().st_mtime_ns for number in (0, 2)}
    assert run(work, "cut")[0] == 0
    assert content(out) == content(done)
    assert before == {number: (out / shard_writer.shard_name(number)).stat().st_mtime_ns for number in (0, 2)}
    assert "complete already" in run(work, "cut")[1]


@pytest.mark.parametrize("number", [0, 1])
def test_killed_it_goes_on(number, work, done):
    """kill -9 as soon as a shard is begun; the second run continues with what is whole."""
    out = work / f"killed_{number}"
    options = [f"--tokenizer={work / 'dvae'}", f"--data={work / 'images'}", f"--out={out}", "--batch-size=8"]
    line = [sys.executable, str(PROGRAM), *options]
    run_until(1, str(out / f"*{shard_writer.shard_name(number)}*"), line)
    assert not (out / "manifest.parquet").exists()
    assert run(work, out.name)[0] == 0
    assert content(out) == content(done)


def test_wrong_inputs_get_one_line(work, done):
    for message, arguments in {
        "another tokenizer; delete it": ("codes", "other"),
        "not an export": ("new", "images"),
    }.items():
        code, printed = run(work, *arguments)
        assert code == 2 and message in printed.splitlines()[-1]
