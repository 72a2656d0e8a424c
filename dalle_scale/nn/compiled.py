"""C files of this package, compiled once for the processor that runs them.

Compiled files lie in $XDG_CACHE_HOME/dalle_scale (~/.cache/dalle_scale), named by what they were made from: the source,
the compiler and the processor's features. Who uses them has a slower form of the same in Python, for systems other than
Linux, without a compiler or a folder to write to, and for DALLE_SCALE_COMPILE=0.
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

_OPTIONS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120  # for a compiler that hangs
_DIGEST_BYTES = 32


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of the C file `name` beside this module, or None where they cannot be had.

    Several processes may ask at once: each compiles, and whole files replace each other.
    """
    if sys.platform != "linux" or os.environ.get("DALLE_SCALE_COMPILE") == "0":
        return None
    try:
        return _loaded(Path(__file__).with_name(name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).debug("%s is not compiled: %s", name, error)
        return None


def _loaded(source: Path) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle_scale"
    path = folder / f"{source.stem}-{_digest(source, compiler)}.so"
    if not _whole(path):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _compile(compiler, source, path)
    return ctypes.CDLL(str(path))


def _digest(source: Path, compiler: str) -> str:
    """What a compiled file depends on, in 32 hexadecimal digits."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = {line for line in file if line.split(":")[0].strip() in ("flags", "Features", "model name")}
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_SECONDS).stdout
    parts = [
        source.read_bytes(),
        compiler.encode(),
        version,
        " ".join(_OPTIONS).encode(),
        *map(str.encode, sorted(processor)),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _whole(path: Path) -> bool:
    """Whether there is a file that ends with the digest of the rest, as `_compile` leaves it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile(compiler: str, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_OPTIONS, "-o", str(built), str(source)]
        subprocess.run(command, capture_output=True, check=True, timeout=_SECONDS)
        with built.open("r+b") as file:  # a loader ignores what follows the sections; one cut off would crash it
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        os.replace(built, path)
