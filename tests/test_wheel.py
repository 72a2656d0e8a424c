"""The wheel: its files, sampling without the packages of extras, and the command that it brings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.exports import export_stage
from support.processes import HANG_SECONDS, ROOT, environment
from support.ranking import PROMPTS, clip_export

FOLDERS = ("dalle_scale", "launch", "data_tools", "configs")
HIDDEN = ("deepspeed", "tensorboard", "pyarrow", "webdataset", "aiohttp", "isal", "py3langid")
HIDE = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
DALLE = {"text_vocab": 48, "text_length": 8, "image_vocab": 12, "grid": 4, "width": 16, "layers": 2, "heads": 2}


def run(line: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=HANG_SECONDS, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    done = run([sys.executable, "-m", "pip", "wheel", *options])
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


def test_every_file_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                place = path.relative_to(ROOT).as_posix()
                expected.add(place if folder == "dalle_scale" else f"dalle_scale/bundled/{place}")
    assert found == expected
    assert "dalle_scale/bundled/launch/train.py" in found and "dalle_scale/py.typed" in found


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `dalle-scale` of an environment with the core's packages alone: those of extras cannot be imported."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    quiet = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    line = [sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel]
    done = run(line, env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.returncode == 0, done.stderr
    [site] = (folder / "env" / "lib").glob("*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(HIDE)
    return folder / "env" / "bin" / "dalle-scale"


def outside(folder: Path) -> dict[str, object]:
    """To start a program in a folder, without what shows it the checkout."""
    return {"cwd": folder, "env": {key: value for key, value in environment().items() if key != "PYTHONPATH"}}


def test_the_core_samples_and_reranks(core: Path, tmp_path: Path) -> None:
    clip = clip_export(tmp_path, PROMPTS)
    sizes = {"image_size": 16, "downsampling": 4, "vocab": 12, "stem": "patch", "n_hid": 8, "multipliers": (1,)}
    dvae = export_stage(tmp_path / "dvae", "dvae", {}, **sizes)
    parts = {"text_tokenizer": tmp_path / "text.model", "tokenizer": dvae}
    model = export_stage(tmp_path / "dalle", "dalle", parts, **DALLE, conv_kernel=3)
    prompts = ["--prompts", PROMPTS[0], "--prompts", PROMPTS[1], "--candidates", "2"]
    done = run([core, "sample", "--model", model, *prompts, "--out", "samples"], **outside(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "samples" / "images").glob("*.png"))) == 4
    line = [core, "rerank", "--samples", "samples", "--clip", clip, "--keep", "1", "--out", "best"]
    done = run(line, **outside(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "best" / "best").glob("*.png"))) == 2
    rows = map(json.loads, (tmp_path / "best" / "scores.jsonl").read_text().splitlines())
    assert sorted(row["rank"] for row in rows) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["sampel"], "error: no program 'sampel'; did you mean 'sample'?"),
        (["train", "tiny/vea"], "error: train: no config among tiny/vea; did you mean 'tiny/vae'?"),
        (["verify-shards", "."], "error: this needs the package pyarrow: pip install 'dalle_scale[data]'"),
    ],
)
def test_one_line_and_exit_code_2(core: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    done = run([core, *arguments], **outside(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"{line}\n")


@pytest.mark.parametrize("program", ["verify_shards", "index_shards", "inspect_shards", "download", "pick_prompts"])
def test_a_program_started_as_a_file_names_the_extra(core: Path, tmp_path: Path, program: str) -> None:
    """Its imports at the top fail before its `main` begins."""
    done = run(
        [core.with_name("python"), ROOT / "data_tools" / f"{program}.py", "a", "--out", "b"], **outside(tmp_path)
    )
    line = "error: this needs the package pyarrow: pip install 'dalle_scale[data]'\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_alone_it_lists_every_program(core: Path, tmp_path: Path) -> None:
    done = run([core], **outside(tmp_path))
    programs = [
        path.stem.replace("_", "-") for folder in ("launch", "data_tools") for path in (ROOT / folder).glob("*.py")
    ]
    assert done.returncode == 0 and all(f"  {program} " in done.stdout for program in programs)


def test_train_gives_the_launcher_its_flags(tmp_path: Path) -> None:
    """From the checkout, with the real launcher: what stands before the config is the launcher's."""
    line = [sys.executable, "-m", "dalle_scale", "train", "-q", "--num_gpus", "1", "tiny/vae", "--dry-run"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), environment()["PYTHONPATH"]])}
    done = run(line, cwd=tmp_path, env=environment() | paths)
    assert done.returncode == 0 and "floating-point operations" in done.stdout, done.stdout + done.stderr
