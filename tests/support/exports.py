"""Untrained exports, and a data set with a damaged image, to try programs on that read both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from support.processes import ROOT
from support.runs import write_images
from torch import nn

from dalle_scale import config as configs
from dalle_scale import stages
from dalle_scale.checkpoint import export
from dalle_scale.data.manifest import Manifest

DAMAGED = 25


def save_dvae(folder: Path, image_size: int = 32) -> Path:
    """An untrained dVAE of the shipped tiny configuration: codes of 64, one for 4 x 4 pixels."""
    model = yaml.safe_load((ROOT / "configs" / "tiny" / "dvae.yaml").read_text())["model"]
    return save(folder, "dvae", **{**model, "image_size": image_size})


def save(folder: Path, name: str, **model: Any) -> Path:
    stage_class = stages.resolve(name)
    config = configs.parse(stage_class.Config, model, where="model")
    torch.manual_seed(0)
    nets = stage_class(config).nets()
    export.save(folder, name, config, {name: net.state_dict() for name, net in nets.items()})
    return folder


def write_data(folder: Path) -> Path:
    """45 images in three shards, one of them damaged."""
    write_images(folder, 45, size=40)
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(int(Manifest.open(folder).entry(DAMAGED, "png").offset) + 20)
        file.write(b"damage")
    return folder


def fresh_weights(stage):
    """Weights that spread the logits, so that draws differ."""
    torch.manual_seed(0)
    nets = stage.nets()
    for parameter in nets["model"].parameters():
        nn.init.normal_(parameter, std=0.2)
    return {"model": nets["model"].state_dict()}


def export_stage(folder, name, parts, **sizes):
    """An export of an untrained stage."""
    stage = stages.resolve(name)
    config = stage.Config(**sizes)
    export.save(folder, name, config, fresh_weights(stage(config)), parts)
    return folder


def save_tokenizer(folder: Path, seed: int) -> Path:
    """An untrained dVAE of the shipped tiny configuration: 32 x 32 images, 8 x 8 codes of 64."""
    model = yaml.safe_load((ROOT / "configs" / "tiny" / "dvae.yaml").read_text())["model"]
    stage_class = stages.resolve("dvae")
    config = configs.parse(stage_class.Config, model, where="model")
    torch.manual_seed(seed)
    nets = stage_class(config).nets()
    export.save(folder, "dvae", config, {name: net.state_dict() for name, net in nets.items()})
    return folder
