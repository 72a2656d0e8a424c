"""Untrained CLIP exports, folders of samples to rank, and the program that ranks them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from support.processes import ROOT
from torch import nn

from dalle_scale.checkpoint import export
from dalle_scale.stages import clip

PROGRAM = ROOT / "launch" / "rerank.py"


PROMPTS = ["a red circle", "a blue square above a circle", "two circles"]


LONG = "a red circle " * 40


# Kernels may sum in another order for another batch, which moves a sum of n numbers by up to n eps / 2 of their size.
# Terms of the sums that a score of `clip_export` goes through: patches of 3 x 8 x 8; of width 32 four norms, queries
# and keys, values, the way out of attention, the MLP and the projection; heads of 16; an MLP of 128; the length of 8
# numbers and the cosine. Both vectors of a score do: twice the half.
SCORE_ROUNDING = (3 * 8 * 8 + 9 * 32 + 16 + 128 + 2 * 8) * torch.finfo(torch.float32).eps


def spread(model: nn.Module) -> nn.Module:
    """Weights that make scores differ clearly."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clip_export(root: Path, captions: list[str], **options: Any) -> Path:
    """An export of an untrained clip stage whose text tokenizer knows `captions`."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20),
        model_prefix=str(root / "text"),
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    towers = {"patch": 8, "width": 32, "layers": 1, "heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2}
    config = clip.Stage.Config(image_size=16, embed_dim=8, text_vocab=48, text_length=8, **towers, **options)
    model = spread(clip.Stage(config).nets()["model"])
    export.save(root / "export", "clip", config, {"model": model.state_dict()}, {"text_tokenizer": root / "text.model"})
    return root / "export"


def write_samples(folder: Path, prompts: list[str], candidates: int) -> Path:
    """What launch/sample.py writes, of noise."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for place, image in enumerate(pillows(noise(len(prompts) * candidates, side=16))):
        index, candidate = divmod(place, candidates)
        file = f"images/{index:05d}_{candidate:04d}.png"
        image.save(folder / file)
        row = {"prompt_index": index, "prompt": prompts[index], "candidate": candidate, "seed": 100 - place}
        rows.append(json.dumps(row | {"file": file}))
    (folder / "samples.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def rerank_program(monkeypatch, *arguments: object) -> int:
    """Run launch/rerank.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    return int(caught.value.code or 0)


def noise(count: int, side: int = 20) -> torch.Tensor:
    """uint8 images [count, 3, side, side]."""
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def pillows(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
