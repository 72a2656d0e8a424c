"""Contents of a file as a record keeps them: numbers of JSON, and hashes, under the names that the file gives them.

Images count by their pixels, weights tensor by tensor, tars member by member. Left out are times and rates, texts in
JSON, which say in words what the numbers are, and files that are only to be looked at: pages, galleries, logs.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

Value = str | float | int | bool | None
SHOWN = ("gallery.png",)
UNSTEADY = {"time_seconds", "samples_per_second", "rows_per_second", "seconds"}  # what differs in every run of one code


def of_output(output: Path) -> dict[str, Value]:
    """Of a file, or of all files below a folder, by "path: name"."""
    assert output.exists(), f"{output} was not written"
    paths = sorted(path for path in output.rglob("*") if path.is_file()) if output.is_dir() else [output]
    return {
        f"{path.relative_to(output.parent)}: {name}": value for path in paths for name, value in of_file(path).items()
    }


def of_file(path: Path) -> dict[str, Value]:
    """The contents of one file, nothing of a kind that is not recorded."""
    readers = {
        ".json": lambda: steady(json.loads(path.read_text(encoding="utf-8"))),
        ".jsonl": lambda: steady([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]),
        ".safetensors": lambda: {name: of_array(array) for name, array in load_file(path).items()},
        ".png": lambda: {"pixels": of_array(np.asarray(Image.open(path)))},
        ".jpg": lambda: {"pixels": of_array(np.asarray(Image.open(path)))},
        ".tar": lambda: of_tar(path),
        ".model": lambda: {"bytes": sha256(path.read_bytes())},
    }
    read = readers.get(path.suffix)
    return read() if read and path.name not in SHOWN else {}


def of_tar(path: Path) -> dict[str, Value]:
    """The bytes of each member."""
    found: dict[str, Value] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, f"{path}: {member.name} is no file"
            found[member.name] = sha256(file.read())
    return found


def of_array(array: np.ndarray[Any, Any]) -> str:
    """Type, shape and bytes."""
    return f"{array.dtype} {list(array.shape)} {sha256(np.ascontiguousarray(array).tobytes())}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def steady(tree: Any) -> dict[str, Value]:
    """The leaves of a JSON tree by dotted name, but for texts and what is unsteady."""
    return {name: value for name, value in leaves(tree, "") if not isinstance(value, str)}


def leaves(tree: Any, name: str) -> Iterator[tuple[str, Value]]:
    """Names and values; `name` is that of the tree."""
    if not isinstance(tree, dict | list):
        yield name, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key not in UNSTEADY:
            yield from leaves(value, f"{name}.{key}" if name else str(key))
