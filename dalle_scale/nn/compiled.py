"""C and C++ files of this package, compiled once for the processor that runs them.

Compiled files lie in $XDG_CACHE_HOME/dalle_scale (~/.cache/dalle_scale), named by what they were made from: the source,
the compiler, torch and the processor's features. Who uses them does without on systems other than Linux, without a
compiler or a folder to write to, and for DALLE_SCALE_COMPILE=0.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_TORCH = Path(torch.__file__).parent
_WAYS = {  # compiler and options by the file's suffix; only C++ is compiled against torch
    ".c": ("cc", "-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
    ".cpp": ("c++", "-std=c++20", "-O2", f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}"),
}
_LIBRARIES: dict[str, tuple[str, ...]] = {".c": (), ".cpp": ("-lc10",)}  # come after the source
_SECONDS = 120  # for a compiler that hangs
_DIGEST_BYTES = 32


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of the file `name` beside this module, or None where they cannot be had.

    Several processes may ask at once: each compiles, and whole files replace each other.
    """
    if sys.platform != "linux" or os.environ.get("DALLE_SCALE_COMPILE") == "0":
        return None
    try:
        return _loaded(Path(__file__).with_name(name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).debug("%s is not compiled: %s", name, error)
        return None


def cache_folder() -> Path:
    """Folder of what is kept for this machine. Raises RuntimeError where nobody knows this user's home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle_scale"


def _loaded(source: Path) -> ctypes.CDLL:
    name, *options = _WAYS[source.suffix]
    compiler = shutil.which(name)
    if compiler is None:
        raise RuntimeError(f"no compiler {name}")
    command = [compiler, *options, "-shared", "-fPIC"]
    folder = cache_folder()
    path = folder / f"{source.stem}-{_digest(source, command)}.so"
    if not _whole(path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(command, source, path)
    return ctypes.CDLL(str(path))


def _digest(source: Path, command: list[str]) -> str:
    """Digest of everything that a compiled file depends on, in 32 hexadecimal digits."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = {line for line in file if line.split(":")[0].strip() in ("flags", "Features", "model name")}
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=_SECONDS).stdout
    parts = [source.read_bytes(), version, *map(str.encode, [*command, torch.__version__, *sorted(processor)])]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _whole(path: Path) -> bool:
    """Whether there is a file that ends with the digest of the rest, as `_compile` leaves it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile(command: list[str], source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*command, str(source), *_LIBRARIES[source.suffix], "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS)
        with built.open("r+b") as file:  # a loader ignores what follows the sections; one cut off would crash it
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(built, path)
