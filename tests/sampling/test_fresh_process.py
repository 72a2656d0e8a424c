"""An export opened in a fresh process, where DeepSpeed cannot be imported, gives the same images: every stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fresh import digests
from support.processes import HANG_SECONDS, ROOT, environment
from torch import nn

from dalle_scale import config, stages
from dalle_scale.checkpoint import export

TOKENIZERS = ("dvae", "vqvae", "vqvae2", "vqgan")


def export_tiny(folder: Path, name: str, parts: dict[str, Path] | None = None, **changes: object) -> str:
    """The model of a tiny config with weights that spread what comes out."""
    run = config.load(ROOT / "configs" / "tiny" / f"{name}.yaml")
    kind = stages.resolve(name)
    stage = kind(config.parse(kind.Config, {**run.model, **changes}, "model"))
    torch.manual_seed(0)
    nets = stage.nets()
    for net in nets.values():
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
    export.save(folder, name, stage.config, {key: net.state_dict() for key, net in nets.items()}, parts or {})
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Every stage that gives images; priors with their tokenizer, and without captions."""
    folder = tmp_path_factory.mktemp("exports")
    made = {name: export_tiny(folder / name, name) for name in (*TOKENIZERS, "vae")}
    made["ddpm"] = export_tiny(folder / "ddpm", "ddpm", text_length=0, text_vocab=0, caption_dropout=0.0)
    dvae, vqvae2 = export.load(made["dvae"]).stage, export.load(made["vqvae2"]).stage
    parts = {"tokenizer": folder / "dvae"}
    grid = {"image_vocab": dvae.config.vocab, "grid": dvae.config.image_size // dvae.config.downsampling}
    dalle = export_tiny(folder / "dalle", "dalle", parts, **grid, text_length=0)
    parts = {"tokenizer": folder / "vqvae2"}
    grids = vqvae2.tokenizer(export.load(made["vqvae2"]).nets).grids
    levels = {"grids": grids, "vocab": vqvae2.config.quantizer.vocab, "text_length": 0, "text_vocab": 0}
    priors = [export_tiny(folder / f"prior_{level}", "vqvae2_prior", parts, level=level, **levels) for level in (0, 1)]
    return [[made[name]] for name in made] + [[dalle], priors]


def test_every_stage_that_gives_images_is_here(models: list[list[str]]) -> None:
    assert {export.load(folders[0]).name for folders in models} == set(stages.names()) - {"clip"}


def test_the_same_images(models: list[list[str]]) -> None:
    program = [sys.executable, str(ROOT / "tests" / "support" / "fresh.py"), *(",".join(folders) for folders in models)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums run in the order of this process
    done = subprocess.run(program, env=environment() | threads, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout)
    assert fresh == digests(models)
    assert len(set(fresh.values())) == len(models)  # nets that sample nothing would agree as well
