"""Checkpoints on disk: nothing half-written is ever found, and what does not fit is refused in one line.

What engines put into them is tested with real engines in tests/dist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_scale import io
from dalle_scale.checkpoint import resume
from dalle_scale.config import RunConfig, parse
from dalle_scale.engine.schedule import Schedule
from dalle_scale.types import UserError


class Counter:
    """The smallest thing that can be saved."""

    def __init__(self, config: RunConfig, value: int = 0) -> None:
        self.schedule = Schedule(config.optim["model"].schedule, config.steps)
        self.value = value

    def save(self, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "value").write_text(str(self.value))

    def load(self, folder: Path) -> None:
        self.value = int((folder / "model" / "value").read_text())


def make(run: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "stage": "dvae",
        "run": str(run),
        "steps": 100,
        "global_batch_size": 8,
        "model": {"vocab": 64, "multipliers": [1, 2]},
        "data": {"train": "x"},
        "optim": {"model": {"lr": 0.1, "schedule": {"kind": "plateau"}}},
        "engine": {"dtype": "fp32"},
    }
    for key, value in changes.items():
        node = tree
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return parse(RunConfig, tree, "test")


def save(run: Path, step: int, keep: int = 2, **changes: Any) -> Counter:
    config = make(run, **changes)
    part = Counter(config, value=step * 10)
    part.schedule.halvings = step
    resume.save(run, step, config, {"model": part}, {"next_batch": step}, keep)
    return part


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in resume.committed(run)]


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found = resume.find(tmp_path, "auto")
    assert found is not None
    assert (found.step, found.world_size, found.stream) == (7, 1, {"next_batch": 7})
    config = make(tmp_path)
    resume.check(found, config, world_size=1)
    part = Counter(config)
    resume.load(found, {"model": part})
    assert part.value == 70 and part.schedule.halvings == 7


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9_999_999_999):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == [10, 9_999_999_999]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_the_update_is_read_from_inside(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 6)
    folder = tmp_path / "checkpoints"
    (folder / "00000005").rename(folder / "best")
    (folder / "00000006").rename(folder / "00000001")
    found = resume.find(tmp_path, "auto")
    assert found is not None and found.step == 6 and steps(tmp_path) == [5, 6]


def test_uncommitted_folders_do_not_exist(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 6)
    (tmp_path / "checkpoints" / "00000006" / "COMMIT").unlink()
    found = resume.find(tmp_path, "auto")
    assert found is not None and found.step == 5
    assert resume.find(tmp_path / "other", "auto") is None


@pytest.mark.parametrize("step", ["part", "sync", "publish", "write"])
def test_a_save_that_dies_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """No space at any point of the way: the previous checkpoint is found, and the next save succeeds."""
    save(tmp_path, 5, keep=1)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Counter, "save") if step == "part" else (io, step)), full)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [5]
    found = resume.find(tmp_path, "auto")
    assert found is not None and found.step == 5
    save(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [6]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000006"]


def test_saving_an_update_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    resume.save(tmp_path, 5, make(tmp_path), {"model": Counter(make(tmp_path), 99)}, {}, keep=2)
    (found,) = resume.committed(tmp_path)
    part = Counter(make(tmp_path))
    resume.load(found, {"model": part})
    assert part.value == 99


def truncate(folder: Path) -> None:
    (folder / "model" / "value").write_text("")


def remove(folder: Path) -> None:
    (folder / "model" / "value").unlink()


def other_format(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    text = json.dumps({**state, "format": "dalle_scale checkpoint 9"}, indent=1)
    (folder / "state.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model/value: damaged checkpoint \(0 bytes, 2 bytes were saved\)"),
        (remove, r"model/value: damaged checkpoint \(missing, 2 bytes"),
        (other_format, "written by another version"),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Any, message: str) -> None:
    save(tmp_path, 5)
    damage(tmp_path / "checkpoints" / "00000005")
    with pytest.raises(UserError, match=message):
        resume.find(tmp_path, "auto")


def test_resume_no_does_not_touch_a_run(tmp_path: Path) -> None:
    assert resume.find(tmp_path, "no") is None
    save(tmp_path, 5)
    with pytest.raises(UserError, match="holds a run with 5 steps; take another run="):
        resume.find(tmp_path, "no")


def test_resume_from_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "a", 5)
    save(tmp_path / "a", 6)
    folder = str(tmp_path / "a" / "checkpoints" / "00000005")
    found = resume.find(tmp_path / "b", folder)
    assert found is not None and found.step == 5
    with pytest.raises(UserError, match="continues to step 6; take another run="):
        resume.find(tmp_path / "a", folder)
    with pytest.raises(UserError, match="not a committed checkpoint"):
        resume.find(tmp_path / "b", str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__vocab": 128}, "saved with model.vocab=64, this run has 128"),
        ({"model__multipliers": [1, 4]}, r"model.multipliers=\[1, 2\], this run has \[1, 4\]"),
        ({"model__stem": "patch"}, r"model.stem=\(default\), this run has 'patch'"),
        ({"stage": "dalle"}, "stage='dvae', this run has 'dalle'"),
        ({"optim__model__lr": 0.2}, "optim.model.lr=0.1, this run has 0.2"),
        ({"optim__model__schedule__kind": "cosine"}, "optim.model.schedule.kind='plateau'"),
        ({"global_batch_size": 16}, "global_batch_size=8"),
        ({"seed": 1}, "seed=0"),
        ({"engine__dtype": "bf16"}, "engine.dtype='fp32'"),
        ({"data__text_tokenizer": "y"}, "data.text_tokenizer"),
        ({"steps": 4}, "has 5 steps, more than steps=4"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    save(tmp_path, 5)
    (found,) = resume.committed(tmp_path)
    with pytest.raises(UserError, match=told) as error:
        resume.check(found, make(tmp_path, **changes), world_size=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 200},
        {"log__every": 1},
        {"data__train": "moved"},
        {"engine__micro_batch_size": 2},
        {"engine__zero": 3},
    ],
)
def test_what_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path, 5)
    (found,) = resume.committed(tmp_path)
    resume.check(found, make(tmp_path / "elsewhere", **changes), world_size=1)


@pytest.mark.parametrize(
    ("saved", "wanted", "told"),
    [
        ({"zero": 1}, {"zero": 2, "nodes": 2}, None),
        ({"zero": 1, "compression_rank": 2}, {"zero": 1, "nodes": 4}, None),  # as many ranks in each
        ({"zero": 1, "compression_rank": 2}, {"zero": 1, "nodes": 2}, "by 1 processes in .* engine.zero=1 and 2;"),
        (
            {"zero": 1, "compression_rank": 2},
            {"zero": 3, "nodes": 4},
            "saved at engine.zero=1 .* engine.zero=3 and 1",
        ),
    ],
)
def test_numbers_of_ranks(tmp_path: Path, saved: dict[str, int], wanted: dict[str, int], told: str | None) -> None:
    """Free, but that what compression left behind belongs to one cut."""
    rank = {"compression_rank": saved.get("compression_rank", 0)}
    before, now = ({f"engine__{key}": value for key, value in (part | rank).items()} for part in (saved, wanted))
    save(tmp_path, 5, **before)
    (found,) = resume.committed(tmp_path)
    if told is None:
        resume.check(found, make(tmp_path, **now), world_size=4)
    else:
        with pytest.raises(UserError, match=told) as error:
            resume.check(found, make(tmp_path, **now), world_size=4)
        assert "\n" not in str(error.value)
