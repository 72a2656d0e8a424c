"""Results of a diffusion recipe: its curves, bits per dimension, and images sampled with more and more steps.

    python benchmarks/diffusion_recipe.py ddpm/cifar10_32 --clip runs/cifar10_32/clip/export

after `deepspeed --num_gpus 2 launch/train.py configs/<name>.yaml`. Evaluates the export on the held-out images
(launch/evaluate.py); for each number of steps samples images by DDIM from the captions of held-out images
(launch/sample.py), measures how close they come to the training set in the features of CLIP (launch/fidelity.py), and
sends held-out images to their latents and back (launch/interpolate.py). Writes benchmarks/results/recipe_<name>.json
and .png.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from environment import ROOT, describe
from PIL import Image
from recipes import DATA_NOTE, PROGRAMS, RESULTS, curve, metrics, rounded, training

from dalle_scale import log
from dalle_scale.config import RunConfig, load
from dalle_scale.types import UserError

STEPS = (10, 20, 50, 100, 1000)
CAPTIONS, SHOWN = 10, 4  # prompts; images of each that are shown
CANDIDATES = {1000: SHOWN}  # images of each that are sampled, where it is not MANY
MANY = 12
TRIPS = (10, 20, 50, 100)  # steps of the round trip
PAPERS = {
    "bits_per_dim": "at most 3.75 (DDPM, Table 2)",
    "fid": "3.17 (DDPM, 1000 steps); DDIM by steps 10, 20, 50, 100, 1000: 13.36, 6.84, 4.67, 4.16, 4.04 (Table 1)",
    "round_trip_mse": "DDIM by steps 10, 20, 50, 100: 0.014, 0.0065, 0.0023, 0.0009 (Table 2)",
    "note": "nets of 35.7 million parameters, trained for 800,000 steps of 128 images",
    "data": DATA_NOTE,
}


def main() -> None:
    """Evaluate, sample, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a config below configs/, without .yaml")
    parser.add_argument("--clip", required=True, help="export of a clip run on the same data")
    args = parser.parse_args()
    config = load(ROOT / f"configs/{args.recipe}.yaml")
    run = Path(config.run)
    if not (run / "export").exists():
        raise UserError(f"{run}: not trained to the end; first deepspeed launch/train.py configs/{args.recipe}.yaml")
    out = run / "result"
    seconds = measure(config, run, out, args.clip)
    [quality] = read(out / "evaluation" / "comparison.json")["exports"]
    result = {
        "training": training(run),
        "held_out": {key: rounded(value) for key, value in quality.items() if key not in ("name", "export")},
        "by_steps_of_ddim": {steps: by_steps(out, steps, seconds[f"sample {steps}"]) for steps in STEPS},
        "papers": PAPERS,
        **describe(),
    }
    name = f"recipe_{args.recipe.replace('/', '_')}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(run, out, RESULTS / f"{name}.png")
    print(json.dumps(result, indent=1))


def measure(config: RunConfig, run: Path, out: Path, clip: str) -> dict[str, float]:
    """Run all programs; the seconds of each."""
    export, valid, prompts = f"{run}/export", str(config.data.valid), out / "prompts"
    commands = {
        "evaluate": PROGRAMS.python("launch/evaluate.py", export, f"--data={valid}", f"--out={out}/evaluation"),
        "prompts": PROGRAMS.python(
            "data_tools/pick_prompts.py", f"--data={valid}", f"--limit={CAPTIONS}", f"--out={prompts}"
        ),
    }
    seconds = PROGRAMS.run(commands)
    images = [str(path) for path in sorted(prompts.glob("**/*.png"))]
    commands = {}
    for steps in STEPS:
        shutil.rmtree(out / f"samples_{steps}", ignore_errors=True)  # sampling would continue with them, and is timed
        how = [f"--model={export}", "method=ddim", "clip=true", f"steps={steps}"]
        how += [f"--prompt-file={prompts}/prompts.jsonl", f"--candidates={CANDIDATES.get(steps, MANY)}"]
        how.append(f"--out={out}/samples_{steps}")
        commands[f"sample {steps}"] = PROGRAMS.python("launch/sample.py", *how)
        compared = [f"--samples={out}/samples_{steps}", f"--reference={config.data.train}", f"--clip={clip}"]
        compared += ["--subset=50", "--measures", "frechet", "kernel", f"--out={out}/fidelity_{steps}"]
        if steps not in CANDIDATES:
            commands[f"compare {steps}"] = PROGRAMS.python("launch/fidelity.py", *compared)
        if steps in TRIPS:
            walked = [f"--model={export}", f"steps={steps}", f"--out={out}/between_{steps}", "--count=2"]
            walked += ["--images", *images]
            commands[f"walk {steps}"] = PROGRAMS.python("launch/interpolate.py", *walked)
    return seconds | PROGRAMS.run(commands)


def by_steps(out: Path, steps: int, seconds: float) -> dict[str, Any]:
    """What is known of one number of steps."""
    images = CAPTIONS * CANDIDATES.get(steps, MANY)
    row: dict[str, Any] = {"images": images, "seconds_a_image": round(seconds / images, 3)}
    if steps not in CANDIDATES:
        found = read(out / f"fidelity_{steps}" / "fidelity.json")["numbers"]
        row |= {number["name"]: rounded(number["value"]) for number in found}
    if steps in TRIPS:
        row["round_trip_mse"] = rounded(read(out / f"between_{steps}" / "interpolation.json")["round_trip_mse"])
    return row


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def draw(run: Path, out: Path, path: Path) -> None:
    """Curves above the images of each number of steps: a row for each caption."""
    figure = plt.figure(figsize=(15, 8.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 6])
    rows = metrics(run)
    names = ("mse", "bound", *(f"quarter_{part}" for part in (1, 2, 3, 4)))
    names = tuple(name for name in names if any(f"train/{name}" in row for row in rows))
    for axes, name in zip(np.atleast_1d(above.subplots(1, len(names))), names, strict=True):
        curve(axes, rows, name)
        axes.set_yscale("log")
    for axes, steps in zip(below.subplots(1, len(STEPS)), STEPS, strict=True):
        axes.imshow(sheet(out / f"samples_{steps}" / "images"), interpolation="nearest")
        axes.set_title(f"DDIM, {steps} steps", fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def sheet(folder: Path) -> np.ndarray:
    """The first images of each caption side by side."""
    names = [[f"{row:05d}_{column:04d}.png" for column in range(SHOWN)] for row in range(CAPTIONS)]
    return np.concatenate(
        [np.concatenate([np.asarray(Image.open(folder / name)) for name in row], axis=1) for row in names], axis=0
    )


if __name__ == "__main__":
    log.guarded(main)
