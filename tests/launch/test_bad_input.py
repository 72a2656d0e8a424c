"""launch/train.py refuses wrong input before it imports deepspeed or builds a net: one clear line each."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.autoencoder import Stage
from support.processes import HANG_SECONDS, ROOT, environment
from support.runs import toy_run, write_config

from dalle_scale.checkpoint import export
from dalle_scale.types import UserError

Train = Callable[..., None]


@pytest.fixture
def train(toy_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """train(*arguments, **changes): the program's main, in this process, for a toy run with changed sections."""
    spec = importlib.util.spec_from_file_location("launch_train", ROOT / "launch" / "train.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def run(*arguments: str, **changes: Any) -> None:
        config = write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "run"), **changes)
        monkeypatch.setattr(sys, "argv", ["train.py", str(config), *arguments])
        program.main()

    return run


def test_dry_run_tells_and_stops(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither data nor tokenizer need to exist yet."""
    train("--dry-run", "data.train=absent", "tokenizer=absent", "engine.zero=1")
    told = capsys.readouterr().out
    assert "zero: 1" in told and "7,840 parameters" in told and "optimizer" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=dvea", "unknown stage 'dvea'; did you mean 'dvae'"),
        ("stage=support.nothing", "no module 'support.nothing'"),
        ("stage=support", "unknown stage 'support'"),
        ("model.widht=3", "unknown key 'widht'; did you mean 'width'"),
        ("data.train=absent", "absent/manifest.parquet: no such file"),
        ("data.valid=absent", "absent/manifest.parquet: no such file"),
        ("tokenizer=absent", "absent: no such export folder"),
        ("engine.dtype=fp16", "fp16 needs a GPU"),
        ("engine.micro_batch_size=3", "does not divide"),
        ("optim.critic.lr=0.1", "optim: has entries for model, critic, stage 'support.autoencoder' trains model"),
    ],
)
def test_wrong_config(train: Train, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(override)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_muon_with_zero(train: Train) -> None:
    with pytest.raises(UserError, match="muon needs whole matrices"):
        train("optim.model.kind=muon", "engine.zero=2")


def test_missing_shard(train: Train, toy_data: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in Path(toy_data["train"]).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar: this shard is missing"):
        train(f"data.train={folder}")


def test_tokenizer_that_is_none(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run0").mkdir()
    with pytest.raises(UserError, match="not an export"):
        train(f"tokenizer={tmp_path / 'run0'}")


def test_tokenizer_of_another_vocabulary(train: Train, tmp_path: Path) -> None:
    stage = Stage(Stage.Config())
    export.save(tmp_path / "e", "support.autoencoder", stage.config, {"model": stage.nets()["model"].state_dict()})
    model = {"width": 8, "layers": 1, "heads": 1, "image_vocab": 8, "grid": 1, "text_vocab": 300, "text_length": 4}
    with pytest.raises(UserError, match=r"model\.image_vocab: 8, but the image tokenizer has 4"):
        train(f"tokenizer={tmp_path / 'e'}", stage="dalle", model=model)


def test_resume_from_nothing(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a committed checkpoint"):
        train("--resume", str(tmp_path))


def test_wrong_input_costs_no_import_of_deepspeed(toy_data: dict[str, str], tmp_path: Path) -> None:
    """And through the program itself: one line, exit code 2."""
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "run"))
    block = "import sys; sys.modules['deepspeed'] = None; import runpy; sys.argv = sys.argv[1:]; "
    code = block + "runpy.run_path(sys.argv[0], run_name='__main__')"
    line = [sys.executable, "-c", code, str(ROOT / "launch" / "train.py"), str(config), "data.train=absent"]
    done = subprocess.run(line, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: absent/manifest.parquet: no such file") and done.stderr.count("\n") == 1
