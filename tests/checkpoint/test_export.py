"""The export: round trip, independence of deepspeed, strictness, atomic replacement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.autoencoder import Stage
from support.processes import HANG_SECONDS

from dalle_scale import io
from dalle_scale.checkpoint import export
from dalle_scale.types import ImageTokenizer, UserError

NAME = "support.autoencoder"


def save(folder: Path, seed: int = 0, **config: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    stage = Stage(Stage.Config(**config))
    state = stage.nets()["model"].state_dict()
    export.save(folder, NAME, stage.config, {"model": state})
    return state


def test_round_trip(tmp_path: Path) -> None:
    state = save(tmp_path / "export", width=12)
    before = torch.get_rng_state()
    opened = export.load(tmp_path / "export")
    assert torch.equal(before, torch.get_rng_state())
    assert opened.name == NAME and opened.config == Stage.Config(width=12)
    loaded = opened.nets["model"].state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert not opened.nets["model"].training
    assert not any(p.requires_grad for p in opened.nets["model"].parameters())


def test_what_is_told_of_the_weights(tmp_path: Path) -> None:
    state, config = Stage(Stage.Config()).nets()["model"].state_dict(), Stage.Config()
    trained = {"step": 3, "steps": 5, "weights": {"model": "ema 0.9"}}
    export.save(tmp_path / "known", NAME, config, {"model": state}, trained=trained)
    save(tmp_path / "unknown")
    assert export.load(tmp_path / "known").trained == trained and export.load(tmp_path / "unknown").trained == {}


def test_tied_and_channels_last_tensors_survive(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    export.save(tmp_path / "e", NAME, Stage.Config(), {"model": {"a": weight, "b": weight}})
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "e" / "model.safetensors")
    assert torch.equal(loaded["a"], weight) and torch.equal(loaded["b"], weight)


def test_parts_and_upstream(tmp_path: Path) -> None:
    save(tmp_path / "lower")
    (tmp_path / "bpe.model").write_bytes(b"words")
    net = Stage(Stage.Config()).nets()["model"]
    parts = {"text_tokenizer": tmp_path / "bpe.model", "tokenizer": tmp_path / "lower"}
    export.save(tmp_path / "upper", NAME, Stage.Config(), {"model": net.state_dict()}, parts)
    (tmp_path / "bpe.model").unlink()
    opened = export.load(tmp_path / "upper")
    text = opened.part("text_tokenizer")
    assert text is not None and text.name == "text_tokenizer.model" and text.read_bytes() == b"words"
    assert opened.part("nothing") is None
    assert isinstance(opened.stage.upstream, ImageTokenizer) and opened.stage.upstream.vocab == 4
    with pytest.raises(UserError, match="'text_tokenizer' part"):
        export.save(tmp_path / "upper", NAME, Stage.Config(), {"model": net.state_dict()}, parts)
    assert export.load(tmp_path / "upper").part("tokenizer")  # the failed save left the old export alone


def test_replaces_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path / "export")
    with monkeypatch.context() as patch:
        patch.setattr(io, "sync", lambda folder: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            save(tmp_path / "export", seed=1)
    assert torch.equal(export.load(tmp_path / "export").nets["model"].down.weight, first["down.weight"])
    second = save(tmp_path / "export", seed=1)
    assert torch.equal(export.load(tmp_path / "export").nets["model"].down.weight, second["down.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]  # no temporary left


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.rename(f.with_name("gone")), "no such export folder"),
        (lambda f: (f / "config.yaml").unlink(), "not an export"),
        (lambda f: (f / "config.yaml").write_text("stage: dvae"), "not an export"),
        (lambda f: (f / "config.yaml").write_text("{"), "not an export"),
        (lambda f: (f / "model.safetensors").unlink(), "weights are missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"), "not a readable safetensors"),
        (lambda f: edit(f, format="dalle_scale export 99"), "this version reads"),
        (lambda f: edit(f, model={"width": 24}), r"another architecture: 'down.weight' is \[16, 256\] .* \[24, 256\]"),
        (lambda f: edit(f, model={"widht": 24}), "did you mean 'width'"),
        (lambda f: edit(f, nets=["model", "critic"]), "nets"),
        (lambda f: edit(f, stage="support.nothing"), "no module 'support.nothing'"),
    ],
)
def test_bad_exports_are_user_errors(tmp_path: Path, damage, message: str) -> None:
    save(tmp_path / "export")
    damage(tmp_path / "export")
    with pytest.raises(UserError, match=message) as error:
        export.load(tmp_path / "export")
    assert "\n" not in str(error.value)


def edit(folder: Path, **changes: object) -> None:
    header = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**header, **changes}))


@pytest.mark.parametrize("extra", ["missing", "unexpected"])
def test_weights_are_loaded_strictly(tmp_path: Path, extra: str) -> None:
    state = dict(Stage(Stage.Config()).nets()["model"].state_dict())
    if extra == "missing":
        del state["mix.bias"]
    else:
        state["mix.more"] = torch.zeros(1)
    export.save(tmp_path / "e", NAME, Stage.Config(), {"model": state})
    with pytest.raises(UserError, match=r"another architecture: 'mix\."):
        export.load(tmp_path / "e")


def test_a_run_folder_is_told_from_its_export(tmp_path: Path) -> None:
    save(tmp_path / "run" / "export")
    with pytest.raises(UserError, match=r"did you mean .*run/export"):
        export.load(tmp_path / "run")


def test_loads_without_deepspeed_and_pickle(tmp_path: Path) -> None:
    save(tmp_path / "export")
    code = f"""
import sys, pickle
sys.modules["deepspeed"] = None
import torch
torch.load = pickle.load = pickle.loads = pickle.Unpickler = None
from dalle_scale.checkpoint import export
tokenizer = export.open_tokenizer({str(tmp_path / "export")!r})
print(tokenizer.encode(torch.zeros(2, 3, 8, 8)).shape)
"""
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "[2, 1]" in done.stdout


def test_open_tokenizer_refuses_other_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "export")
    monkeypatch.delattr(Stage, "tokenizer")
    with pytest.raises(UserError, match="not an image tokenizer"):
        export.open_tokenizer(tmp_path / "export")
