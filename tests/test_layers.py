"""The import arrow of docs/design.md holds, and heavy packages stay at home."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dalle_scale"
CORE = {"types", "config", "dist", "log", "ranklog"}
MAY_IMPORT = {  # part -> parts it may import, besides itself and, outside the core, the core
    "types": set(),
    "dist": set(),
    "config": {"types"},
    "ranklog": {"dist"},
    "log": {"types", "dist", "ranklog"},
    "nn": set(),
    "stages": {"nn"},
    "data": set(),
    "engine": {"nn"},
    "checkpoint": {"nn", "stages"},
    "sample_memory": {"nn"},
    "sample": {"nn", "stages", "checkpoint", "data", "sample_memory"},
    "sample_store": {"checkpoint", "sample"},
    "sample_overlap": {"rerank", "sample", "sample_store"},
    "interpolate": {"nn", "stages", "checkpoint"},
    "rerank": {"nn", "stages", "checkpoint", "data", "sample"},
    "prompts": set(),
    "rejection": {"prompts", "rerank"},
    "rerank_page": {"checkpoint", "gallery", "rejection", "rerank"},
    "features": {"nn", "checkpoint", "rerank"},
    "fidelity_result": {"checkpoint"},
    "fidelity_sources": {"checkpoint", "data", "evaluate", "fidelity_result", "rerank"},
    "fidelity": {"nn", "features", "fidelity_result", "fidelity_sources"},
    "clip_evaluate": {"checkpoint", "data", "evaluate", "rerank"},
    "clip_evaluate_samples": {"clip_evaluate", "rerank"},
    "clip_evaluate_page": {"checkpoint", "clip_evaluate", "data", "evaluate", "gallery"},
    "evaluate": {"nn", "checkpoint", "data"},
    "evaluate_page": {"checkpoint", "evaluate"},
    "gallery": set(),
    "steps": set(),
    "doctor_probes": set(),
    "doctor": {"doctor_probes"},
    "plan_activations": {"stages"},
    "plan": {"engine", "plan_activations"},
    "plan_page": {"checkpoint"},
    "train": {"engine", "checkpoint"},
}
HOMES = {  # package -> files of the library that may import it
    "deepspeed": ("engine/",),
    "webdataset": ("data/",),
    "sentencepiece": ("data/text.py",),
    "transformers": ("data/text.py", "rerank.py", "nn/torchvision_ops.py"),
    "open_clip": ("nn/torchvision_ops.py", "rerank.py", "stages/clip.py"),
    "torchvision": ("nn/torchvision_ops.py",),
    "torch_fidelity": ("features.py",),
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


def part_of(path: Path) -> str:
    """The part of the library that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrow(path):
    part = part_of(path)
    if part == "__init__":
        return
    allowed = MAY_IMPORT[part] | {part} | (set() if part in CORE else CORE)
    for name in imports(path):
        if name.startswith("dalle_scale."):
            assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_have_one_home(path):
    relative = str(path.relative_to(PACKAGE))
    for name in imports(path):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or relative.startswith(homes), f"{relative} may not import {name}"


def test_sampling_needs_neither_deepspeed_nor_webdataset():
    code = (
        "import sys, dalle_scale.sample; "
        "sys.exit(any(name in sys.modules for name in ('deepspeed', 'webdataset', 'open_clip', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_are_short():
    for path in FILES + sorted((ROOT / "launch").glob("*.py")):
        limit = 120 if path.parent.name == "launch" else 400
        assert len(path.read_text().splitlines()) <= limit, f"{path} is longer than {limit} lines"


def test_every_test_file_is_collected(request):
    """pytest's default skips folders named "dist", "build" and the like without a word."""
    skipped = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders if any(fnmatch(folder.name, pattern) for pattern in skipped)]
