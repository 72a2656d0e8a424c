"""What the tests of tars that others wrote share: write some, index them, read the data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.damage import Files
from support.programs import load_program

from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader

index_shards = load_program("index_shards")


def index(*arguments: Any) -> None:
    """Run index_shards.py in this process."""
    index_shards.main([*map(str, arguments), "--workers", "1"])


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples of a data set; each member must read."""
    manifest = Manifest.open(folder)
    reader, found = Reader(manifest), {}
    for sample in range(manifest.num_samples):
        names = [name for name in manifest.members if manifest.entry(sample, name)]
        found[manifest.key(sample)] = {name: reader.read(sample, name) for name in names}
    reader.close()
    assert len(found) == manifest.num_samples
    return found


def grouped(files: Files) -> dict[str, dict[str, bytes]]:
    """What sound files are as samples."""
    found: dict[str, dict[str, bytes]] = {}
    for name, content in files:
        key, _, extension = name.partition(".")
        found.setdefault(key, {})[extension] = content
    return found


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_tars(folder: Path, tars: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tar in tars.items():
        (folder / name).write_bytes(tar)
    return folder
