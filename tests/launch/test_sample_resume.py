"""launch/sample.py killed and started again, on what it takes up and what it refuses; and with --rerank."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.exports import export_stage
from support.processes import ROOT, free_port, in_ranks, run_until
from support.programs import run_here, run_rank
from support.ranking import PROMPTS, SCORE_ROUNDING, clip_export

from dalle_scale.models.transformer import cache_size
from dalle_scale.models.transformer.kv_cache import KVCache
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.sampling import batch_size, runner
from dalle_scale.sampling.sampler import Batch, Sampler

PROGRAM = ROOT / "launch" / "sample.py"
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"text_vocab": 48, "text_length": 8, "image_vocab": 12, "grid": 4, "width": 16, "layers": 2, "heads": 2}
CANDIDATES = 40


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_export(tmp_path_factory.mktemp("clip"), PROMPTS)


@pytest.fixture(scope="module")
def model(clip: Path) -> Path:
    """An untrained transformer; its images are larger than those that CLIP reads."""
    pixels = {"image_size": 16, "downsampling": 4, "vocab": 12, "stem": "patch", "n_hid": 8, "multipliers": (1,)}
    dvae = export_stage(clip.parent / "dvae", "dvae", {}, **pixels)
    parts = {"text_tokenizer": clip.parent / "text.model", "tokenizer": dvae}
    return export_stage(clip.parent / "dalle", "dalle", parts, **SIZES, conv_kernel=3)


def options(model: Path, out: Path, candidates: int = CANDIDATES, *more: object) -> list[str]:
    prompts = [f"--prompts={prompt}" for prompt in PROMPTS[:2]]
    return [f"--model={model}", f"--out={out}", f"--candidates={candidates}", "--seed=3", *prompts, *map(str, more)]


def sampled(*arguments: object) -> str:
    code, printed = run_here(PROGRAM, *arguments)
    assert code == 0, printed
    return printed


def refused(*arguments: object) -> str:
    code, printed = run_here(PROGRAM, *arguments)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2, printed
    return line


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each image is, and since when."""
    found = {path.name: path.stat() for path in (folder / "images").glob("*.png")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    sampled(*options(model, folder))
    return folder


def test_killed_it_goes_on_with_what_is_missing(model: Path, whole: Path, tmp_path: Path) -> None:
    """All bytes as without the interruption, no image sampled twice, whatever the batch."""
    out = tmp_path / "out"
    line = [sys.executable, str(PROGRAM), *options(model, out, CANDIDATES, "--batch-size=1")]
    run_until(3, f"{out}/images/*.png", line)
    before = images(out)
    assert 3 <= len(before) < 2 * CANDIDATES and not (out / "samples.jsonl").exists()
    assert (out / "sampling.json").exists()
    (out / "images" / ".00001_0039.png.tmp").write_bytes(b"half an image")
    assert f"{len(before)} of {2 * CANDIDATES} images are there" in sampled(*options(model, out))
    assert files(out) == files(whole)
    assert before.items() <= images(out).items()


def test_more_candidates_go_on_and_fewer_do_not(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sampled(*options(model, out, 5))
    before = images(out)
    sampled(*options(model, out))
    assert files(out) == files(whole) and before.items() <= images(out).items()
    rows = (out / "samples.jsonl").stat()
    assert "candidates is 40 there and 5 now" in refused(*options(model, out, 5))
    assert (out / "samples.jsonl").stat().st_mtime_ns == rows.st_mtime_ns


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--seed=4", "seed is 3 there and 4 now"),
        ("--prompts=a", "prompts is 2 there and 3 now"),
        ("guidance=2", "guidance is 1.0 there and 2.0 now"),
        ("--text-tokenizer={model}/text_tokenizer.model", "text_tokenizer is null there and "),
        ("", "models_sha256 is "),
    ],
)
def test_another_way_of_drawing_is_refused(model: Path, whole: Path, tmp_path: Path, changed: str, named: str) -> None:
    before, drawer = files(whole), model
    if not changed:
        drawer = tmp_path / "other"
        shutil.copytree(model, drawer)
        (drawer / "more").touch()
    message = refused(*options(drawer, whole, CANDIDATES, *filter(None, [changed.format(model=model)])))
    assert named in message and "another --out, or remove" in message
    assert files(whole) == before


def test_other_prompts_of_the_same_number_and_images_of_nobody(model: Path, whole: Path, tmp_path: Path) -> None:
    arguments = [option.replace(PROMPTS[1], "two circles") for option in options(model, whole)]
    assert "prompts_sha256 is " in refused(*arguments)
    moved, out = tmp_path / "moved", tmp_path / "out"
    shutil.copytree(model, moved)
    shutil.copytree(whole, out)
    assert f"{2 * CANDIDATES} of {2 * CANDIDATES} images are there" in sampled(*options(moved, out))
    (out / "sampling.json").unlink()
    assert "holds images and no sampling.json" in refused(*options(model, out))
    (out / "sampling.json").write_text("[1]")
    assert "not a JSON object" in refused(*options(model, out))


def test_reranked_in_the_same_command(model: Path, clip: Path, whole: Path, tmp_path: Path) -> None:
    """What launch/rerank.py says of the files: sampled at once, and half of them from an earlier run."""
    drawn_at_once, gone_on, expected = tmp_path / "once", tmp_path / "on", tmp_path / "expected"
    rerank = (f"--clip={clip}", "--keep=2")
    sampled(*options(model, drawn_at_once, CANDIDATES, *rerank, "--batch-size=7"))
    sampled(*options(model, gone_on, CANDIDATES // 2))
    sampled(*options(model, gone_on, CANDIDATES, *rerank))
    code, printed = run_here(
        ROOT / "launch/rerank.py", f"--samples={whole}", f"--clip={clip}", "--keep=2", f"--out={expected}"
    )
    assert code == 0, printed
    theirs = [json.loads(line) for line in (expected / "scores.jsonl").read_text().splitlines()]
    for out in (drawn_at_once, gone_on):
        ours = [json.loads(line) for line in (out / "reranked" / "scores.jsonl").read_text().splitlines()]
        scores = [[row.pop("score") for row in rows] for rows in (ours, [dict(row) for row in theirs])]
        assert scores[0] == pytest.approx(scores[1], abs=SCORE_ROUNDING)
        assert ours == [{key: value for key, value in row.items() if key != "score"} for row in theirs]
        assert files(out / "reranked" / "best") == files(expected / "best")
        assert (out / "reranked" / "gallery.html").exists()
        assert {name: data for name, data in files(out).items() if not name.startswith("reranked")} == files(whole)
    assert len({row["score"] for row in theirs}) > CANDIDATES  # they differ, or nothing is shown
    assert "--keep: 41" in refused(*options(model, tmp_path / "x", 40, f"--clip={clip}", "--keep=41"))


def test_two_ranks_share_what_is_missing_and_its_scores(model: Path, clip: Path, whole: Path, tmp_path: Path) -> None:
    """On any number of ranks, the first interrupted with images of all kinds of places missing."""
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        shutil.copytree(whole, out)
        for place in (0, 3, 4, 38, 39):
            (out / "images" / f"00001_{place:04d}.png").unlink()
    more = (f"--clip={clip}", "--keep=3")
    sampled(*options(model, one, CANDIDATES, *more))
    in_ranks(run_rank, free_port(), PROGRAM, options(model, two, CANDIDATES, *more))
    theirs, ours = files(one), files(two)
    assert theirs.keys() == ours.keys() and len(ours) > 2 * CANDIDATES + 3
    assert [name for name in ours if ours[name] != theirs[name] and Path(name).name != "scores.jsonl"] == []
    scores = [
        [json.loads(line)["score"] for line in (out / "reranked/scores.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=SCORE_ROUNDING)


def test_saving_that_fails_ends_the_program(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved before stays; no half image does."""
    out, saved = tmp_path / "out", Image.Image.save

    def save(image: Image.Image, file: Any, *form: str) -> None:
        if "00000_0003" in getattr(file, "name", ""):
            file.write(b"half")
            raise OSError("disk full")
        saved(image, file, *form)

    monkeypatch.setattr(Image.Image, "save", save)
    code, printed = run_here(PROGRAM, *options(model, out, 5, "--batch-size=1"))
    assert code == 1 and "disk full" in printed and not (out / "samples.jsonl").exists()
    assert set(images(out)) == {f"00000_{candidate:04d}.png" for candidate in range(3)}


def test_drawing_that_fails_leaves_what_was_drawn(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, sample_batch = tmp_path / "out", Sampler.sample_batch

    def fail_at_the_third(self: Sampler, batch: Batch, *more: Any) -> torch.Tensor:
        if batch.candidate == [2]:
            raise RuntimeError("device lost")
        return sample_batch(self, batch, *more)

    monkeypatch.setattr(Sampler, "sample_batch", fail_at_the_third)
    code, printed = run_here(PROGRAM, *options(model, out, 5, "--batch-size=1"))
    assert code == 1 and "device lost" in printed
    assert set(images(out)) == {"00000_0000.png", "00000_0001.png"}


def test_keep_needs_a_ranking(model: Path, tmp_path: Path) -> None:
    assert "--keep: 2, but nothing ranks" in refused(*options(model, tmp_path / "out", 5, "--keep=2"))
    assert "--keep: 0, but a prompt has 5" in refused(*options(model, tmp_path / "out", 5, "--clip=x", "--keep=0"))
    assert not (tmp_path / "out").exists()


# ---- progress ----


@pytest.mark.parametrize(
    ("drawn_by", "codes"),
    [({}, 16), ({"prime": torch.ones(4, dtype=torch.int64)}, 12), ({"size": (5, 6)}, 30)],
)
def test_told_after_each_code(model: Path, drawn_by: dict[str, Any], codes: int) -> None:
    """And the images are the same."""
    sampler = Sampler([model])
    options = sampler.options(**{"size": drawn_by["size"]} if "size" in drawn_by else {})
    [batch] = sampler.batches(PROMPTS, [(0, 0), (1, 0), (0, 1)], 0, options, prime=drawn_by.get("prime"))
    told: list[tuple[int, int]] = []
    sampled = sampler.sample_batch(batch, lambda *numbers: told.append(numbers))
    assert told == [(number, codes) for number in range(1, codes + 1)]
    assert torch.equal(sampled, sampler.sample_batch(batch))


def test_the_bar_moves_within_a_batch(model: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    for candidate in range(3):
        (tmp_path / "out" / "images" / f"00000_{candidate:04d}.png").unlink()
    printed = sampled(*options(model, tmp_path / "out", CANDIDATES, "--batch-size=2"))
    assert "sample:   0%" in printed and "0.0/3 [" in printed
    assert "sample: 100%" in printed and "3.0/3 [" in printed and " images/s]" in printed
    sampler, places = Sampler([model]), []
    with runner.progress_bar(5) as bar:
        bar.update(1.0)
        [batch] = sampler.batches(PROMPTS, [(0, 0), (0, 1)], 0)

        def on_code(*numbers: int) -> None:
            runner.advance(bar, 1.0, 2, *numbers)
            places.append(bar.n)

        sampler.sample_batch(batch, on_code)
    assert places == pytest.approx([1 + number / 8 for number in range(1, 17)])


# ---- memory ----


def bytes_of(cache: KVCache) -> int:
    values = [*vars(cache).values(), *vars(cache.image).values()]
    kept = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_bytes_are_those_of_the_caches(dtype: torch.dtype) -> None:
    kinds = ("row", "column", "conv", "full", "row")
    sizes = {"text_vocab": 20, "text_length": 5, "image_vocab": 11, "grid": 6, "width": 24, "heads": 3}
    net = Transformer(**sizes, kinds=kinds, conv_kernel=3).to(dtype)
    prefix_index = torch.tensor([0, 1, 0, 0, 1])
    with torch.inference_mode():
        _, decoding = net.prefill(torch.randint(20, (2, 5)), prefix_index)
        net.decode_step(torch.zeros(5, dtype=torch.int64), 0, decoding)
    caches = [bytes_of(block._cache) for block in decoding.blocks]
    assert 5 * cache_size.cache_bytes(net) + 2 * cache_size.caption_bytes(net) == sum(caches)
    assert sum(block._fused_qkv[0].nbytes for block in decoding.blocks) == cache_size.fused_qkv_bytes(net)


def test_batches_of_what_is_free(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory samples twice as many; guidance costs as much again; one image always; a cap."""
    sampler = Sampler([model])
    net = sampler.models[0].nets["model"]

    def fitting(free: int, guided: bool = False, captions: int = 1) -> int:
        monkeypatch.setattr(batch_size, "_available_bytes", lambda: free)
        return batch_size.images_per_batch(cache_size.sampling_memory(net, guided), captions, 1000, sampler.device)

    few, more = fitting(200_000), fitting(400_000)
    assert 1 < few < more < 256 and fitting(400_000, guided=True) < more and fitting(400_000, captions=900) < more
    assert more * cache_size.cache_bytes(net) < 0.8 * 400_000
    assert fitting(0) == 1 and fitting(1 << 40) == 256
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fitting(400_000) == few
    monkeypatch.undo()
    assert batch_size.free_bytes(torch.device("cpu")) > 0
    monkeypatch.setattr(batch_size, "_MEMORY_TABLE", Path("/nowhere"))
    assert batch_size.free_bytes(torch.device("cpu")) == batch_size.UNKNOWN_FREE_BYTES


def control_group(folder: Path, limit: str, used: int, idle: int, first_version: bool = False) -> None:
    """The files that a kernel shows."""
    folder.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first_version else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "total_" if first_version else ""
    (folder / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {idle}\nslab 5\n")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0::/job/step\n", 700 - 300 + 50),  # the job's limit; the step has none
        ("0::/job/step/task\n", 100 - 90),
        ("0::/elsewhere\n", 1000),  # a folder that is not mounted here
        ("5:cpu,cpuacct:/job\n4:memory:/box\n0::/\n", 400 - 150 + 20),
        ("4:memory:/docker/0123\n", 1000),  # no limit in the first version: a number beyond all memory
        ("", 1000),
    ],
)
def test_limits_of_containers(own: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_group(tmp_path / "groups" / "job", "700", 300, 50)
    control_group(tmp_path / "groups" / "job" / "step", "max", 200, 0)
    control_group(tmp_path / "groups" / "job" / "step" / "task", "100", 90, 0)
    control_group(tmp_path / "groups" / "memory", "9223372036854771712", 900, 0, first_version=True)
    control_group(tmp_path / "groups" / "memory" / "box", "400", 150, 20, first_version=True)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(batch_size, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(batch_size, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(batch_size, "_available_bytes", lambda: 1000)
    assert batch_size.free_bytes(torch.device("cpu")) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert batch_size.free_bytes(torch.device("cpu")) == expected // 4


def test_control_groups_of_this_process_can_be_read() -> None:
    free = batch_size.free_bytes(torch.device("cpu"))
    assert 0 < free <= batch_size._available_bytes() * 1.1


def test_sampler_takes_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_available_bytes", lambda: 200_000)
    sampler = Sampler([model])
    batches: list[Batch] = sampler.batches(PROMPTS, [(index, k) for index in range(3) for k in range(40)], seed=0)
    assert 1 < len(batches[0].seed) < 120 and sum(len(batch.seed) for batch in batches) == 120
    assert all(len(batch.seed) <= len(batches[0].seed) for batch in batches)
