"""Untrained priors of codes whose logits spread, and a text tokenizer of the captions of `exports.write_data`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import nn

from dalle_scale import config as configs
from dalle_scale import stages
from dalle_scale.checkpoint import export

TEXT = {"text_length": 6, "text_vocab": 40}
DALLE = {"width": 16, "layers": 2, "heads": 2, "conv_kernel": 3, **TEXT}
PIXELSNAIL = {
    "width": 8, "residual_width": 8, "layers": 2, "kernel": 3, "attention_blocks": 1, "heads": 2, "output_layers": 1,
    "conditioning_layers": 1, "dropout": 0.5,
}  # fmt: skip


def save_text(folder: Path) -> Path:
    captions = [f"image number {index}" for index in range(45)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 5),
        model_prefix=str(folder / "text"),
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "text.model"


def save_prior(folder: Path, name: str, parts: dict[str, Path] | None = None, **model: Any) -> Path:
    stage_class = stages.resolve(name)
    config = configs.parse(stage_class.Config, model, where="model")
    torch.manual_seed(len(folder.name))
    nets = stage_class(config).nets()
    for parameter in nets["model"].parameters():
        nn.init.normal_(parameter, std=0.3)
    export.save(folder, name, config, {"model": nets["model"].state_dict()}, parts)
    return folder
