"""Small data sets, configurations of short runs, and what runs log."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image


def write_images(folder: Path, count: int, size: int = 8, seed: int = 0) -> Path:
    """A data set of `count` captioned noise images in shards of 20."""
    from dalle_scale.curation.shard_writer import ShardWriter

    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for index in range(count):
            file = io.BytesIO()
            base = rng.integers(0, 256, 3, dtype=np.uint8)
            noise = rng.integers(0, 40, (size, size, 3), dtype=np.uint8)
            Image.fromarray((base // 2 + noise).astype(np.uint8)).save(file, "png")
            writer.add(f"{index:05d}", {"png": file.getvalue(), "txt": f"image number {index}".encode()})
    return folder


def write_config(path: Path, tree: dict[str, Any], **changes: Any) -> Path:
    """A run's YAML; `changes` replace top-level keys."""
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False), encoding="utf-8")
    return path


def toy_run(data: dict[str, str], run: Path, **changes: Any) -> dict[str, Any]:
    """Configuration tree of a short run of the toy stage."""
    tree = {
        "stage": "support.autoencoder",
        "run": str(run),
        "steps": 8,
        "global_batch_size": 8,
        "data": data,
        "optim": {"model": {"lr": 0.003, "weight_decay": 0.1, "clip_norm": 0.5, "ema_decay": 0.8}},
        "engine": {"dtype": "fp32"},  # not what this machine is fastest with
        "log": {"every": 1},
    }
    return {**tree, **changes}


def metrics(run: Path) -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time_seconds", "samples_per_second")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]
