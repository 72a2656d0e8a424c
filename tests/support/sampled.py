"""An untrained CLIP export and a folder of samples, to compare sets of images with and of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import nn

from dalle_scale.checkpoint import export
from dalle_scale.stages import clip


def save_clip(folder: Path, seed: int = 0) -> Path:
    """An export whose image vectors have 8 dimensions and differ clearly."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["an image", "image number one"] * 20),
        model_prefix=str(folder / "text"),
        vocab_size=24,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    towers = {"patch": 8, "width": 32, "layers": 1, "heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2}
    config = clip.Stage.Config(image_size=16, embed_dim=8, text_vocab=32, text_length=8, **towers)
    torch.manual_seed(seed)
    model = clip.Stage(config).nets()["model"]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    parts = {"text_tokenizer": folder / "text.model"}
    export.save(folder / "export", "clip", config, {"model": model.state_dict()}, parts)
    return folder / "export"


def save_samples(folder: Path, images: torch.Tensor, **sampling: Any) -> Path:
    """Images uint8 [N, 3, H, W] as launch/sample.py writes them, two of each prompt."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for place, image in enumerate(images):
        row = {"prompt_index": place // 2, "prompt": f"p{place // 2}", "candidate": place % 2, "seed": place}
        row["file"] = f"images/{place // 2:05d}_{place % 2:04d}.png"
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / str(row["file"]))
        lines.append(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))
    if sampling:
        (folder / "sampling.json").write_text(json.dumps(sampling))
    return folder


def blobs(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images uint8 [count, 3, side, side] of one colour each, with noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(60, 200, (count, 3, 1, 1), generator=generator)
    return (colours + torch.randint(-50, 50, (count, 3, side, side), generator=generator)).to(torch.uint8)


def values(document: dict[str, Any]) -> dict[str, float]:
    """Numbers of a fidelity.json by their measures."""
    return {number["measure"]: number["value"] for number in document["numbers"]}
