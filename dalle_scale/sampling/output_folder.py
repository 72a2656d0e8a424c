"""The folder that launch/sample.py fills: images that are whole or not there, and what says how they are sampled.

sampling.json comes first, then the images, then samples.jsonl once all are there. What was interrupted resumes from
the images that are there, if the record is the same; more candidates than before are the same run too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_scale import dist, io, log
from dalle_scale.io import digest
from dalle_scale.sampling.sampler import candidate_seed
from dalle_scale.types import UserError

GRID_SAMPLES, GRID_COLUMNS = 256, 12  # grid.png is sampled up to so many; columns where there is but one prompt
Place = tuple[int, int]  # index of the prompt, candidate
_MAY_DIFFER = ("models", "candidates")  # of two records: where the exports lie, and how far the run goes


class Store:
    """One folder of images of some prompts, `candidates` of each."""

    def __init__(self, folder: Path, prompts: list[str], candidates: int, seed: int) -> None:
        self.folder, self.prompts, self.candidates, self.seed = folder, prompts, candidates, seed
        self.places = [(owner, candidate) for owner in range(len(prompts)) for candidate in range(candidates)]

    def record(self) -> dict[str, Any]:
        """Record of what the images depend on, besides the model and its options."""
        return {
            "seed": self.seed,
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "candidates": self.candidates,
        }

    def check(self, record: dict[str, Any]) -> None:
        """Raises UserError if the folder holds images that were sampled another way than `record` says."""
        path = self.folder / "sampling.json"
        if not path.is_file():
            if any((self.folder / "images").glob("*.png")):
                raise UserError(f"{self.folder}: holds images and no sampling.json; take another --out, or remove it")
            return
        try:
            earlier = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise UserError(f"{path}: not a JSON object; take another --out, or remove {self.folder}") from None
        earlier, now = _flat(earlier), _flat(json.loads(json.dumps(record)))
        for name in [*now, *earlier]:
            if name not in _MAY_DIFFER and earlier.get(name) != now.get(name):
                raise UserError(
                    f"{path}: {name} is {_short(earlier.get(name))} there and {_short(now.get(name))} now; "
                    f"take another --out, or remove {self.folder} to sample anew"
                )
        if self.candidates < earlier["candidates"]:
            raise UserError(
                f"{path}: candidates is {earlier['candidates']} there and {self.candidates} now; more can be added, "
                f"for fewer take another --out, or remove {self.folder}"
            )

    def begin(self, record: dict[str, Any]) -> list[Place]:
        """Get ready to sample; returns what is missing, the same on all ranks (a collective)."""
        missing = torch.zeros(len(self.places), dtype=torch.uint8)
        if dist.is_main():
            images = self.folder / "images"
            images.mkdir(parents=True, exist_ok=True)
            for unfinished in images.glob(".*.tmp"):
                unfinished.unlink()
            names = set(os.listdir(images))
            missing = torch.tensor([self.path(*place).name not in names for place in self.places], dtype=torch.uint8)
            if missing.any():
                for whole in ("samples.jsonl", "grid.png"):
                    (self.folder / whole).unlink(missing_ok=True)
            io.write_json(self.folder / "sampling.json", record)
        flags = dist.broadcast(missing).tolist()
        return [place for place, flag in zip(self.places, flags, strict=True) if flag]

    def path(self, prompt_index: int, candidate: int) -> Path:
        """Of an image."""
        return self.folder / "images" / f"{prompt_index:05d}_{candidate:04d}.png"

    def save(self, prompt_index: int, candidate: int, image: Tensor) -> None:
        """An image uint8 [3, H, W], which appears whole or not at all."""
        path = self.path(prompt_index, candidate)
        with io.unfinished(path).open("wb") as file:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
            file.flush()
            os.fsync(file.fileno())
        io.unfinished(path).rename(path)

    def rows(self) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each image."""
        return [
            {
                "prompt_index": index,
                "prompt": self.prompts[index],
                "candidate": candidate,
                "seed": candidate_seed(self.seed, self.prompts[index], candidate),
                "file": self.path(index, candidate).relative_to(self.folder).as_posix(),
            }
            for index, candidate in self.places
        ]

    def finish(self) -> Path:
        """Write what belongs to all images, once they are there; returns what to look at."""
        show = self.folder / "images"
        if len(self.places) <= GRID_SAMPLES:
            show = self.folder / "grid.png"
            images = torch.stack([torch.from_numpy(np.array(Image.open(self.path(*place)))) for place in self.places])
            columns = self.candidates if len(self.prompts) > 1 else min(self.candidates, GRID_COLUMNS)
            log.grid(images.permute(0, 3, 1, 2), columns).save(show)
        io.write_rows(self.folder / "samples.jsonl", self.rows())
        return show


def fingerprint(name: str | Path | None) -> str | None:
    """Fingerprint of a file, folder or name: the sha256 of its content, else the name."""
    if not name:
        return None
    return digest(Path(name)) if Path(name).exists() else str(name)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its options beside the rest."""
    options: dict[str, Any] = record.get("options", {})
    return {name: value for name, value in record.items() if name != "options"} | options


def _short(value: object) -> str:
    """For a message."""
    text = json.dumps(value)
    return text if len(text) <= 50 else f"{text[:24]}…{text[-8:]}"
