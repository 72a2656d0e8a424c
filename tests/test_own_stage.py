"""A stage in a folder of its own, with a sampler, an evaluation and a prior: every program uses it as it is. And no
program or room looks past the contract."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.processes import HANG_SECONDS, ROOT, command, environment
from support.ranking import PROMPTS, clip_export
from support.runs import toy_run, write_images

from dalle_scale.data.manifest import Manifest

NAME = "my_stages.brightness"
SOURCE = '''"""Brightness of a quarter of an image as its code, and how often each code occurs."""

from functools import partial

import torch
from pydantic import Field
from torch import nn

from dalle_scale.models.capabilities import Evaluator, Prior, Sampler
from dalle_scale.models.image_tokenizer import Tokenizer
from dalle_scale.types import BatchSpec, Losses, StrictModel
from dalle_scale.types import Stage as Base

VOCAB, GRID = 8, 2


class Options(StrictModel):
    gain: float = Field(default=1.0, gt=0, description="factor of the brightness")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, codes):
        return -self.logits.float().log_softmax(0)[codes].sum(dim=1)


def encode(images):
    return [images.float().mean(dim=1).unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1)).mean(dim=(2, 4)).long() // 32]


def decode(levels):
    squares = (levels[0] * 32 + 16).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return squares.repeat_interleave(8, 2).repeat_interleave(8, 3)


class Stage(Base):
    class Config(StrictModel):
        image_size: int = 16

    @property
    def inputs(self):
        return BatchSpec(image_size=self.config.image_size)

    def nets(self):
        return {"model": Net()}

    def loss(self, net, nets, batch, step):
        nll = nets[net](encode(batch["image"])[0].flatten(1))
        total = (nll * batch["weight"]).mean()
        return Losses(total, {"nll": total.detach()})

    def flops_per_sample(self):
        return 100.0

    def tokenizer(self, nets):
        sizes = {"vocab": VOCAB, "grids": (GRID,), "image_size": self.config.image_size}
        return Tokenizer(nets["model"], encode, decode, **sizes, samples_at_once=64)

    def sampler(self, nets):
        def sample(request):
            shares = nets["model"].logits.softmax(0) * request.options.gain
            codes = (request.seeds[:, None] >> torch.arange(0, 12, 3)) % VOCAB
            return decode([(codes + shares.argmax()).view(-1, GRID, GRID) % VOCAB])

        return Sampler(Options, sample)

    def code_prior(self, nets):
        def bits(codes, text):
            return nets["model"](codes).double() / torch.log(torch.tensor(2.0)).double()

        return Prior(bits, VOCAB, (GRID,), 0, 0, 0, True)

    def evaluator(self, nets):
        return Evaluator(partial(self.brightness, nets))

    def brightness(self, nets, batches):
        means = [batch["image"].float().mean() for batch in batches]
        return {"brightness": float(torch.stack(means).mean())}
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`my_stages/brightness.py`, a data set, a CLIP, and a trained export of the stage."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_stages").mkdir()
    (folder / "my_stages" / "__init__.py").touch()
    (folder / "my_stages" / "brightness.py").write_text(SOURCE)
    write_images(folder / "data", 24, size=16)
    clip_export(folder, PROMPTS)
    tree = toy_run({"train": str(folder / "data")}, folder / "run", stage=NAME)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree | {"model": {"image_size": 16}}))
    run(folder, command(ROOT / "launch/train.py", str(folder / "run.yaml")))
    return folder


def run(folder: Path, line: list[str]) -> str:
    done = subprocess.run(line, env=environment(folder), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def program(folder: Path, name: str, *arguments: object) -> str:
    return run(folder, [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)])


def test_sampled_ranked_and_compared(folder: Path) -> None:
    export = folder / "run/export"
    assert "gain: float, > 0, default 1.0, factor of the brightness" in program(
        folder, "sample.py", "--list-options", export
    )
    out = folder / "samples"
    program(folder, "sample.py", "--model", export, "--candidates", 4, "--out", out, "gain=2")
    assert json.loads((out / "sampling.json").read_text())["options"] == {"gain": 2.0}
    assert len(list((out / "images").glob("*.png"))) == 4
    program(folder, "rerank.py", "--samples", out, "--clip", folder / "export", "--out", folder / "best")
    assert len((folder / "best/scores.jsonl").read_text().splitlines()) == 4
    compared = ("--reference", folder / "data", "--clip", folder / "export", "--measures", "kernel", "--subset", 2)
    program(folder, "fidelity.py", "--samples", out, *compared, "--out", folder / "fidelity")
    made_by = json.loads((folder / "fidelity/fidelity.json").read_text())["samples"]["made_by"]
    assert made_by["options"] == {"gain": 2.0} and made_by["stage"] == NAME


def test_encoded_and_evaluated_with_its_own_prior(folder: Path) -> None:
    export = folder / "run/export"
    program(folder, "encode.py", "--tokenizer", export, "--data", folder / "data", "--out", folder / "codes")
    assert Manifest.open(folder / "codes").info["grids"] == [2]
    evaluated = ("--prior", export, "--out", folder / "evaluated")
    program(folder, "evaluate.py", "--data", folder / "data", export, *evaluated)
    [row] = json.loads((folder / "evaluated/comparison.json").read_text())["exports"]
    assert 0 < row["prior_bits"] < 13 and row["codes"] == 4 and 0 < row["brightness"] < 255


def test_planned(folder: Path) -> None:
    cluster = ("--nodes", 1, "--gpus", 1, "--memory-gib", 1, "--flops", 1e9, "--intra-gbps", 1, "--inter-gbps", 1)
    assert "8 parameters" in program(folder, "plan.py", folder / "run.yaml", *cluster)


def test_nothing_asks_a_stage_for_its_class_or_for_methods() -> None:
    """`isinstance(stage, …)`, `hasattr(stage, …)` and `getattr(stage, …)` outside the stages themselves."""
    found = []
    files = [path for room in ("dalle_scale", "launch", "data_tools") for path in (ROOT / room).rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            at_home = path.parent == ROOT / "dalle_scale" / "stages" and node.func.id == "isinstance"
            if node.func.id in ("isinstance", "hasattr", "getattr") and not at_home and "stage" in ast.unparse(node):
                found.append(f"{path}:{node.lineno}")
    assert found == []
    names = [path.stem for path in (ROOT / "dalle_scale/stages").glob("*.py")]
    rooms = [path for path in files if path.parts[len(ROOT.parts) + 1] in ("sampling", "evaluation")]
    imports = [f"{path}: {name}" for path in rooms for name in imported(path) if name.rpartition(".")[2] in names]
    assert imports == []


def imported(path: Path) -> list[str]:
    """Names below dalle_scale.stages that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dalle_scale.stages"):
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return found
