"""CLIP scores of images and captions, and the order that they give.

    scorer = open_scorer("runs/clip/export")
    scores = scorer.score(images, captions)  # cosine similarities
    best = order(scores, seeds)[:k]

A scorer comes from an export of the `clip` stage, from open_clip or from a Hugging Face directory; see `open_scorer`.
`rejection.py` turns it into a classifier.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle_scale import log
from dalle_scale.checkpoint import export
from dalle_scale.data.text import open_text
from dalle_scale.nn.torchvision_compat import import_open_clip, import_transformers
from dalle_scale.types import UserError

_SAMPLE_KEYS = {"prompt_index": int, "prompt": str, "candidate": int, "seed": int, "file": str}


class Scorer(Protocol):
    """Something that says how well images fit captions."""

    scale: float  # what the model multiplies cosines with before a softmax: exp(logit_scale)
    truncated_captions: int  # how many captions were longer than the model reads; equal ones count once

    def image_vectors(self, images: Tensor) -> Tensor:
        """Unit vectors, float32 [N, E] on the CPU, of uint8 images [N, 3, H, W]."""
        ...

    def caption_vectors(self, captions: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [M, E] on the CPU. A caption is encoded once, however often it is asked for."""
        ...

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarities, float32 [N] on the CPU, of uint8 images [N, 3, H, W] and their captions."""
        ...


@dataclass
class TwoTowers:
    """A `Scorer` of two functions: images -> vectors [N, E]; captions -> (vectors [M, E], how many were too long)."""

    encode_images: Callable[[Tensor], Tensor]
    encode_captions: Callable[[list[str]], tuple[Tensor, int]]
    scale: float
    truncated_captions: int = field(default=0, init=False)
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)  # caption -> its unit vector [E]

    @torch.no_grad()
    def image_vectors(self, images: Tensor) -> Tensor:
        """As in `Scorer`."""
        return F.normalize(self.encode_images(images).float(), dim=1).cpu()

    @torch.no_grad()
    def caption_vectors(self, captions: Sequence[str]) -> Tensor:
        """As in `Scorer`."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            features, truncated = self.encode_captions(new)
            self.truncated_captions += truncated
            self._known.update(zip(new, F.normalize(features.float(), dim=1).cpu(), strict=True))
        return torch.stack([self._known[caption] for caption in captions])

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """As in `Scorer`."""
        assert len(images) == len(captions), f"{len(images)} images, {len(captions)} captions"
        return (self.image_vectors(images) * self.caption_vectors(captions)).sum(dim=1)


def order(scores: Tensor, seeds: Sequence[int]) -> list[int]:
    """Positions of candidates, best first: by score, equal scores by the smaller seed.

    Raises:
        UserError: a score is not a number.
    """
    values = scores.tolist()
    assert len(values) == len(seeds), f"{len(values)} scores, {len(seeds)} seeds"
    for value, seed in zip(values, seeds, strict=True):
        if value != value:
            raise UserError(f"the score of the candidate with seed {seed} is NaN: the CLIP model's weights are broken")
    return sorted(range(len(values)), key=lambda place: (-values[place], seeds[place]))


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder/samples.jsonl` as launch/sample.py writes them: prompt_index, prompt, candidate, seed, file.

    Raises:
        UserError: no such file, no rows, or a row without one of these.
    """
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; make samples with launch/sample.py --out {folder}")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            valid = all(isinstance(row[key], kind) for key, kind in _SAMPLE_KEYS.items())
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise UserError(f"{path}: line {number} is not a sample; it needs {', '.join(_SAMPLE_KEYS)}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no samples")
    return rows


def read_images(paths: Sequence[Path]) -> Tensor:
    """Image files as uint8 [N, 3, H, W].

    Raises:
        UserError: a file is missing, is no image, or has another size than the first.
    """
    images: list[Tensor] = []
    for path in paths:
        try:
            with Image.open(path) as file:
                images.append(torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1))
        except OSError as error:
            raise UserError(f"{path}: cannot read the image: {_first_line(error)}") from None
        if images[-1].shape != images[0].shape:
            sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (images[-1], images[0])]
            raise UserError(f"{path}: is {sizes[0]}, others are {sizes[1]}; rank images of one size at a time")
    return torch.stack(images)


def batches(
    folder: Path, rows: Sequence[dict[str, Any]], batch_size: int
) -> Iterator[tuple[Sequence[dict[str, Any]], Tensor]]:
    """Samples by the batch: rows, and their images below `folder` as uint8 [N, 3, H, W]. With a progress bar.

    Raises:
        UserError: as `read_images`.
    """
    starts = range(0, len(rows), batch_size)
    for start in log.progress(starts, "rank", f"batches of {batch_size}", len(starts)):
        part = rows[start : start + batch_size]
        yield part, read_images([folder / row["file"] for row in part])


def score(scorer: Scorer, folder: Path, rows: Sequence[dict[str, Any]], batch_size: int) -> Tensor:
    """Scores float32 [N] of samples whose images lie below `folder`.

    Raises:
        UserError: as `read_images`.
    """
    parts = batches(folder, rows, batch_size)
    return torch.cat([scorer.score(images, [row["prompt"] for row in part]) for part, images in parts])


def rank(rows: Sequence[dict[str, Any]], scores: Tensor) -> list[dict[str, Any]]:
    """Sample rows with "score" and "rank" added, in their own order; the best candidate of each prompt has rank 1.

    Raises:
        UserError: a score is NaN.
    """
    prompts: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        prompts.setdefault(row["prompt_index"], []).append(place)
    ranked = [row | {"score": value} for row, value in zip(rows, scores.tolist(), strict=True)]
    for places in prompts.values():
        for position, best in enumerate(order(scores[places], [rows[place]["seed"] for place in places]), start=1):
            ranked[places[best]]["rank"] = position
    return ranked


def share_of(share: float, candidates: int) -> int:
    """Number of `candidates` that a share keeps: the nearest whole number, a half goes up, at least one."""
    return max(1, math.floor(round(share * candidates, 9) + 0.5))  # 0.145 * 100 is 14.499999999999998


def keep(ranked: Sequence[dict[str, Any]], count: int = 1, share: float | None = None) -> list[dict[str, Any]]:
    """Ranked rows with "kept" added: true for the best `count` of each prompt's candidates, or for their best `share`
    as `share_of` counts it."""
    candidates = Counter(row["prompt_index"] for row in ranked)
    last = {prompt: share_of(share, number) if share else count for prompt, number in candidates.items()}
    return [row | {"kept": row["rank"] <= last[row["prompt_index"]]} for row in ranked]


def open_scorer(name: str, device: str | torch.device = "cpu") -> Scorer:
    """Open the CLIP model that `name` says.

    - a folder with an export of the `clip` stage;
    - a folder with a Hugging Face CLIP model and its processor (`save_pretrained` of both);
    - `MODEL:FILE`, an open_clip model name and a local checkpoint (.pt, .safetensors), as in `ViT-B-32:clip.pt`;
    - `MODEL:TAG` or `MODEL`, an open_clip model name and its published weights `TAG` (the first that open_clip lists),
      fetched by open_clip unless it has them; also `hf-hub:ORGANISATION/MODEL` and `local-dir:FOLDER`.

    Weights are read without pickle, or by torch's `weights_only` reader.

    Raises:
        UserError: nothing of that name, or it cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _open_clip(name, device)
    if (folder / "config.json").is_file():
        return _hugging_face(folder, device)
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{name}", device)
    return _export(folder, device)


def _export(folder: Path, device: str | torch.device) -> Scorer:
    """A run of our own `clip` stage."""
    model = export.load(folder, device)
    encoder = model.stage.image_text_encoder(model.nets)
    if encoder is None:
        raise UserError(f"{folder}: stage '{model.name}' does not score images; 'clip' does")
    tokenizer_path = model.part("text_tokenizer")
    if tokenizer_path is None:
        raise UserError(f"{folder}: holds no text tokenizer; train clip with `data.text_tokenizer: FILE`")
    text = open_text(tokenizer_path, vocab=encoder.text_vocab)

    def encode_captions(captions: list[str]) -> tuple[Tensor, int]:
        before = text.truncated_samples
        tokens = text.encode(captions, encoder.text_length).to(device)
        return encoder.text_features(tokens), text.truncated_samples - before

    return TwoTowers(lambda images: encoder.image_features(images.to(device)), encode_captions, encoder.scale)


def _open_clip(name: str, device: str | torch.device) -> Scorer:
    """Any model that open_clip knows, with the preprocessing and tokenizer that belong to it."""
    open_clip = import_open_clip()
    model_name, options = _open_clip_source(open_clip, name)
    try:
        with _quiet():
            model, preprocess = open_clip.create_model_from_pretrained(model_name, device=device, **options)
            tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # open_clip, torch, safetensors and the hub each have their own
        raise UserError(f"{name}: open_clip cannot open it: {_first_line(error)}") from None
    model.eval()
    pad = tokenizer([""])[0, -1]

    def encode_images(images: Tensor) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in _pillows(images)])
        features: Tensor = model.encode_image(pixels.to(device))
        return features

    def encode_captions(captions: list[str]) -> tuple[Tensor, int]:
        tokens = tokenizer(captions)
        length = tokens.shape[1]
        too_long = tokenizer(captions, context_length=length + 1)[:, length] != pad
        return model.encode_text(tokens.to(device)), int(too_long.sum())

    return TwoTowers(encode_images, encode_captions, float(model.logit_scale.detach().float().exp()))


def _open_clip_source(open_clip: Any, name: str) -> tuple[str, dict[str, Any]]:
    """`MODEL:WEIGHTS` as the name and the options of open_clip's factory."""
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, {}
    model, _, weights = name.partition(":")
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "give an export, a Hugging Face folder or an open_clip name"
        raise UserError(f"{name}: neither a folder nor a model of open_clip; {hint}")
    if Path(weights).is_file():
        return model, {"pretrained": weights}
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not weights and tags:
        weights = tags[0]
        log.say(f"{model}: takes the weights '{weights}'; others: {', '.join(tags[1:]) or 'none'}")
    if weights not in tags:
        known = f"published weights: {', '.join(tags)}" if tags else "open_clip lists none for this model"
        raise UserError(f"{name}: '{weights}' is neither a file nor the name of published weights; {known}")
    # some weights were trained with another activation than the model of that name has
    quick = bool(open_clip.get_pretrained_cfg(model, weights).get("quick_gelu"))
    return model, {"pretrained": weights, "force_quick_gelu": quick}


def _hugging_face(folder: Path, device: str | torch.device) -> Scorer:
    """A directory that transformers' CLIPModel and CLIPProcessor wrote. Never asks the hub."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != "clip":
        raise UserError(f"{folder}: config.json describes a '{kind}' model, not 'clip'")
    transformers = import_transformers()
    try:
        model, loaded = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot open it as CLIP: {_first_line(error)}") from None
    if loaded["missing_keys"]:  # transformers fills them with random numbers
        raise UserError(
            f"{folder}: the weights lack {sorted(loaded['missing_keys'])[0]}; this is not a whole CLIP model"
        )
    model.to(device).eval()
    length = model.config.text_config.max_position_embeddings

    def encode_images(images: Tensor) -> Tensor:
        pixels = processor(images=_pillows(images), return_tensors="pt")["pixel_values"].to(device)
        features: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return features

    def encode_captions(captions: list[str]) -> tuple[Tensor, int]:
        too_long = sum(len(ids) > length for ids in processor.tokenizer(captions)["input_ids"])
        tokens = processor(text=captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens.to(device)).pooler_output), too_long

    return TwoTowers(encode_images, encode_captions, float(model.logit_scale.detach().float().exp()))


def _pillows(images: Tensor) -> list[Image.Image]:
    """uint8 [N, 3, H, W] as Pillow images."""
    return [Image.fromarray(image) for image in images.cpu().permute(0, 2, 3, 1).contiguous().numpy()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back open_clip's log lines, which repeat in the root logger what its exceptions say."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
