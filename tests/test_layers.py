"""The import arrow of docs/design.md holds, and heavy packages stay at home."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dalle_scale"
CORE = {  # one room: who comes first is below
    "types", "config", "dist", "log", "rank_log", "io", "programs", "report", "installed", "extras", "arguments",
    "__main__",
}  # fmt: skip
AFTER = {  # room -> the rooms that it may import, with all that these may
    "core": set(),
    "nn": {"core"},
    "models": {"nn"},
    "stages": {"models"},
    "checkpoint": {"stages"},
    "data": {"core"},
    "curation": {"data"},
    "sampling": {"checkpoint", "data"},
    "evaluation": {"sampling"},
    "engine": {"nn"},
    "train": {"engine", "checkpoint"},
    "cluster": {"engine", "stages"},
}
HOMES = {  # package -> files of the library that may import it
    "deepspeed": ("engine/",),
    "webdataset": ("data/", "curation/"),
    "pyarrow": ("data/", "curation/"),
    "sentencepiece": ("data/text.py",),
    "transformers": ("data/text.py", "sampling/rerank.py", "nn/torchvision_compat.py"),
    "open_clip": ("nn/torchvision_compat.py", "sampling/rerank.py", "stages/clip.py"),
    "torchvision": ("nn/torchvision_compat.py",),
    "torch_fidelity": ("evaluation/feature_extractors.py",),
    "triton": ("engine/adam16_kernel.py",),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(part: str) -> str:
    """The room of a package or module of the library's top level."""
    return "core" if part in CORE else part


def may_import(room: str) -> set[str]:
    """The room, and all rooms that it may import."""
    return {room}.union(*(may_import(other) for other in AFTER[room]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrow(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    allowed = may_import(room_of(part))
    for name in imports(path):
        if name.startswith("dalle_scale."):
            assert room_of(name.split(".")[1]) in allowed, f"{path.relative_to(ROOT)} may not import {name}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_through_others():
    """Nor for types alone."""
    modules = {module_of(path): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = imports(path) | {name.rpartition(".")[0] for name in imports(path)}
        graph[module] = (names & modules.keys()) - {module}
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in sorted(graph[module]):
                follow(other, (*way, module))
            done.add(module)

    for module in graph:
        follow(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_have_one_home(path):
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or relative.startswith(homes), f"{relative} may not import {name}"


def test_sampling_needs_neither_deepspeed_nor_webdataset():
    code = (
        "import sys, dalle_scale.sampling.sampler; "
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'webdataset', 'open_clip', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_test_file_is_collected(request):
    """pytest's default skips folders named "dist", "build" and the like without a word."""
    skipped = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders if any(fnmatch(folder.name, pattern) for pattern in skipped)]
