"""Images between images: the ends are what is sampled or what was given, and wrong input is one line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.exports import save
from support.processes import ROOT
from support.programs import run_here
from torch import nn

from dalle_scale.checkpoint import export
from dalle_scale.models.diffusion.samplers import Options
from dalle_scale.sampling import interpolate
from dalle_scale.sampling.sampler import read_image

run = partial(run_here, ROOT / "launch" / "interpolate.py")
SEEDS = torch.tensor([3, 4, 5])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports `ddpm` (with captions, weights nowhere zero), `vae`, `dvae`; images `0.png` .. `2.png`."""
    folder = tmp_path_factory.mktemp("interpolate")
    for name in ("ddpm", "vae", "dvae"):
        save(folder / name, name, **yaml.safe_load((ROOT / f"configs/tiny/{name}.yaml").read_text())["model"])
    opened = export.load(folder / "ddpm")
    torch.manual_seed(0)
    for parameter in opened.nets["model"].parameters():
        nn.init.normal_(parameter, std=0.3 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1)
    export.save(folder / "ddpm", "ddpm", opened.config, {"model": opened.nets["model"].state_dict()})
    ramp = np.linspace(40, 200, 16)
    for index in range(3):
        planes = np.broadcast_arrays(ramp[:, None], ramp[None], 60.0 * index)
        Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 8), ("vae", None)])
def test_ends_are_what_the_seeds_draw(work: Path, name: str, steps: int | None) -> None:
    opened = export.load(work / name)
    paths = interpolate.between_seeds(interpolate.open_space(opened, [f"steps={steps}"] if steps else []), SEEDS, 5)
    assert paths.images.shape[:2] == (2, 5) and paths.round_trip_mse is None
    how = {"options": Options(method="ddim", steps=steps)} if steps else {}
    sampled = opened.stage.sample_images(opened.nets, SEEDS, **how).int()
    for ends, wanted in ((paths.images[:, 0], sampled[:-1]), (paths.images[:, -1], sampled[1:])):
        assert int((ends.int() - wanted).abs().max()) <= 1
    assert not torch.equal(paths.images[:, 2], paths.images[:, 0])


def test_images_come_back(work: Path) -> None:
    opened, files = export.load(work / "ddpm"), [work / f"{index}.png" for index in range(3)]
    images = torch.stack([read_image(file, 16) for file in files])
    assert torch.equal(images[1, 2], torch.full((16, 16), 60, dtype=torch.uint8))
    paths = interpolate.between_images(interpolate.open_space(opened, ["steps=2"]), images, 3)
    ends = torch.stack([paths.images[:, 0], paths.images[:, -1]], dim=1).double()
    originals = torch.stack([images[:-1], images[1:]], dim=1).double()
    assert float((ends - originals).abs().mean()) < 2
    assert paths.round_trip_mse == pytest.approx(float(((ends - originals) / 255).square().mean()))


def test_program(work: Path, tmp_path: Path) -> None:
    options = ("--model", work / "ddpm", "steps=8", "--count", 4, "--out")
    code, printed = run(*options, tmp_path / "sampled", "--paths", 2, "--seed", 3)
    assert code == 0, printed
    sheet = np.asarray(Image.open(tmp_path / "sampled" / "grid.png"))
    paths = interpolate.between_seeds(interpolate.open_space(export.load(work / "ddpm"), ["steps=8"]), SEEDS, 4)
    assert sheet.shape == (2 * 18 - 2, 4 * 18 - 2, 3)
    assert np.array_equal(sheet[18:34, 36:52], paths.images[1, 2].permute(1, 2, 0).numpy())
    code, printed = run(*options, tmp_path / "given", "--images", work / "0.png", work / "1.png")
    assert code == 0 and "there and back: mean squared error" in printed, printed
    told = json.loads((tmp_path / "given" / "interpolation.json").read_text())
    assert told["round_trip_mse"] > 0 and told["seed"] is None and told["steps"] == 8


def test_wrong_input_is_one_line(work: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    ddpm, image = ("--model", work / "ddpm"), work / "0.png"
    for message, options in {
        "stage 'dvae' has no latents to walk in": ("--model", work / "dvae"),
        "options: unknown key 'steps'": ("--model", work / "vae", "steps=4"),
        "steps: 33, but this model has 32 times": (*ddpm, "steps=33"),
        "spacing = 'even': Input should be": (*ddpm, "steps=4", "spacing=even"),
        "--count: 1, but it has to be at least 2": (*ddpm, "--count", 1),
        "a path has two ends": (*ddpm, "--images", image),
        "give a JPEG": (*ddpm, "--images", image, tmp_path / "text.png"),
        "No such file": (*ddpm, "--images", image, tmp_path / "missing.png"),
        "not an export": ("--model", work),
    }.items():
        code, printed = run(*options, "--out", tmp_path / "out")
        assert code == 2 and message in printed and len(printed.strip().splitlines()) == 1, printed
    assert not (tmp_path / "out").exists()
