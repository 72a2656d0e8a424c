"""Untrained CLIP exports that read captions, and a data set of few captions with two samples that cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import nn

from dalle_scale import config as configs
from dalle_scale.checkpoint import export
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.stages import clip

NAMES = ("frog", "ship", "red truck", "cat")
CAPTIONS = [f"a photo of a {name}" for name in NAMES]
IMAGES, NO_IMAGE, NO_CAPTION = 42, 8, 17  # samples in all; those whose image or caption is damaged
TOWERS = {"patch": 8, "width": 32, "layers": 1, "heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2}


def save_clip(folder: Path, seed: int = 0, **options: Any) -> Path:
    """An export with random weights, large enough for cosines that differ."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = folder.with_suffix(".words")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS, "an image: it is the image of 0123456789"] * 20),
        model_prefix=str(words),
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    values = {"image_size": 16, "embed_dim": 8, "text_vocab": 64, "text_length": 24, **TOWERS, **options}
    stage = clip.Stage(configs.parse(clip.Stage.Config, values, where="model"))
    torch.manual_seed(seed)
    model = stage.nets()["model"]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    parts = {"text_tokenizer": words.with_suffix(".words.model")}
    export.save(folder, "clip", stage.config, {"model": model.state_dict()}, parts)
    return folder


def write_pairs(folder: Path) -> Path:
    """Noise images of 24 x 16 whose captions come in turn; the third caption stands twice as often as the others."""
    rng = np.random.default_rng(5)
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for index in range(IMAGES):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(file, "png")
            image = b"no image" if index == NO_IMAGE else file.getvalue()
            caption = b"\xff\xfe" if index == NO_CAPTION else CAPTIONS[(0, 1, 2, 2, 3)[index % 5]].encode()
            writer.add(f"{index:05d}", {"png": image, "txt": caption})
    return folder


def write_samples(folder: Path, candidates: int = 6) -> Path:
    """What launch/sample.py would write: noise for two prompts, and one candidate more for the second."""
    import json

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(7)
    with (folder / "samples.jsonl").open("w") as rows:
        for prompt in range(2):
            for candidate in range(candidates + prompt):
                file = f"images/{prompt:05d}_{candidate:04d}.png"
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / file)
                row = {"prompt_index": prompt, "prompt": CAPTIONS[prompt], "candidate": candidate}
                rows.write(json.dumps({**row, "seed": 10 * prompt + candidate, "file": file}) + "\n")
    return folder
