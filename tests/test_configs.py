"""Every shipped config is right, and every wrong config is one clear line."""

from pathlib import Path

import pytest
import torch
import yaml

from dalle_scale import config, stages
from dalle_scale.engine import ds_config
from dalle_scale.types import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TINY = ROOT / "configs" / "tiny" / "dvae.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_config(path):
    run = config.load(path)
    assert run.accumulation(world_size=1) >= 1
    kind = stages.resolve(run.stage)
    with torch.device("meta"):
        nets = kind(config.parse(kind.Config, run.model, "model")).nets()
    assert set(nets) == set(run.optim)
    ds_config.check(run, world_size=1, device=torch.device("cuda"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_header_names_the_command(path):
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ") and f"launch/train.py {path.relative_to(ROOT)}" in header


def test_precedence(tmp_path):
    run = config.load(TINY, ["seed=7", "optim.model.lr=3e-4", "data.valid=null"])
    assert run.seed == 7 and run.optim["model"].lr == 3e-4 and run.data.valid is None
    config.dump(run, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz'; did you mean 'steps'?"),
        ("engine.zer=1", "unknown key 'engine.zer'; did you mean 'zero'?"),
        ("optim.model.learning_rate=1", "unknown key 'optim.model.learning_rate'"),
        ("steps=many", "steps = 'many'"),
        ("steps=0", "steps = 0"),
        ("engine.zero=4", "engine.zero = 4"),
        ("seed", "an override is written key=value"),
        ("steps.x=1", "'steps' is a value, not a section"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_wrong_value_is_one_line(override, message):
    with pytest.raises(UserError) as caught:
        config.load(TINY, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_not_a_config_file(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        config.load(path)
    with pytest.raises(UserError, match="no such config file"):
        config.load(tmp_path / "absent.yaml")


def test_missing_key(tmp_path):
    tree = yaml.safe_load(TINY.read_text())
    del tree["data"]["train"]
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"key 'data\.train' is missing"):
        config.load(path)


def test_unknown_stage_and_model_key():
    with pytest.raises(UserError, match="unknown stage 'dvea'; did you mean 'dvae'"):
        stages.resolve("dvea")
    kind = stages.resolve("dvae")
    with pytest.raises(UserError, match="unknown key 'vocabulary'; did you mean 'vocab'"):
        config.parse(kind.Config, {"vocabulary": 3}, "model")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_batch_arithmetic(world_size):
    run = config.load(TINY, ["global_batch_size=24", "engine.micro_batch_size=2"])
    assert run.accumulation(world_size) * run.micro_batch_size(world_size) * world_size == 24
    with pytest.raises(UserError, match="does not divide by the world size 5"):
        run.micro_batch_size(5)
    with pytest.raises(UserError, match="does not divide by micro-batch 7"):
        config.load(TINY, ["global_batch_size=24", "engine.micro_batch_size=7"]).accumulation(world_size)
