"""Exports of 0.1 are read in today's names; checkpoints of 0.1 are refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import Field
from support.autoencoder import Stage

from dalle_scale.checkpoint import convert, export, resume
from dalle_scale.config import parse
from dalle_scale.types import StrictModel, UserError


class Inner(StrictModel):
    warmth_steps: int = 0


class Config(StrictModel):
    inner: Inner = Inner()
    width: int = Field(default=1)


def test_an_export_of_0_1_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key and a tensor that were renamed since."""
    monkeypatch.setitem(convert.RENAMED, "breadth", "width")
    monkeypatch.setitem(convert.TENSORS, "squeeze.", "down.")
    state = Stage(Stage.Config(width=12)).nets()["model"].state_dict()
    old = {name.replace("down.", "squeeze."): tensor for name, tensor in state.items()}
    export.save(tmp_path / "export", "support.autoencoder", Stage.Config(width=12), {"model": old})
    path = tmp_path / "export" / "config.yaml"
    header = yaml.safe_load(path.read_text())
    header |= {"format": convert.FORMAT, "model": {"size": 8, "breadth": 12}}
    path.write_text(yaml.safe_dump(header))
    opened = export.load(tmp_path / "export")
    assert opened.config == Stage.Config(width=12)
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.nets["model"].state_dict().items())


def test_keys_of_sections_are_renamed_and_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(convert.RENAMED, "warmth_updates", "warmth_steps")
    old = {"stage": "x", "model": {"inner": {"warmth_updates": 3}, "width": 2}}
    header = convert.header(old, Config)
    assert parse(Config, header["model"], "model") == Config(inner=Inner(warmth_steps=3), width=2)
    assert header["stage"] == "x"


def test_an_old_key_is_answered_with_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(convert.RENAMED, "breadth", "width")
    with pytest.raises(UserError, match=r"unknown key 'breadth'; it is called 'width' since 0\.2"):
        parse(Config, {"breadth": 1}, "model")


def test_a_checkpoint_of_0_1_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": "dalle_scale checkpoint 2"}))
    (folder / "COMMIT").write_text("{}")
    with pytest.raises(UserError, match="another version of dalle_scale; end the run with that version") as error:
        resume.find(tmp_path, "auto")
    assert "\n" not in str(error.value)
