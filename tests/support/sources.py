"""Sources to build data sets of, the program that builds them, and what it has made."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from support.programs import load_program

from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader

build_shards = load_program("build_shards")


def image_file(seed: int, height: int = 12, width: int = 16, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def build(*arguments, workers: int = 1) -> None:
    build_shards.main([str(argument) for argument in (*arguments, f"--workers={workers}")])


def content(out: Path) -> dict[str, bytes]:
    """All files of a build, the report without what depends on the clock."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    report = json.loads(files["report.json"])
    del report["last_run"]
    return files | {"report.json": json.dumps(report).encode()}


def samples(folder: Path) -> dict[str, tuple[bytes, str]]:
    """caption -> (image file, extension) of a data set."""
    manifest = Manifest.open(folder)
    reader = Reader(manifest)
    result = {}
    for index in range(manifest.num_samples):
        kind = next(name for name in ("jpg", "png", "webp") if manifest.entry(index, name))
        result[reader.read(index, "txt").decode()] = (reader.read(index, kind), kind)
    assert len(result) == manifest.num_samples
    return result


def ledger(out: Path) -> dict[str, str]:
    """name -> reason."""
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert all(set(row) == {"source", "name", "reason"} for row in rows)
    return {row["name"]: row["reason"] for row in rows}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path
