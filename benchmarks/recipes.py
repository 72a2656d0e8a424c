"""What an autoencoder's recipe came to: how it was trained, its curves, how well images come back, what it samples.

    python benchmarks/recipes.py vae/cifar10_32
    python benchmarks/recipes.py vqvae/cifar10_32 --prior dalle/vqvae_cifar10_32
    python benchmarks/recipes.py vqvae2/noto_emoji_128 --prior vqvae2_prior/noto_emoji_128_{top,bottom}

after `deepspeed --num_gpus 2 launch/train.py configs/<name>.yaml` for each of these. Reads the runs that the configs
name, evaluates the export on all held-out images (launch/evaluate.py) and samples samples (launch/sample.py), by the
priors where there are any. Writes benchmarks/results/recipe_<name>.json and .png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from environment import ROOT, describe
from PIL import Image

from dalle_scale import log
from dalle_scale.config import RunConfig, load
from dalle_scale.programs import Command, Programs
from dalle_scale.types import UserError

RESULTS = Path(__file__).parent / "results"
PROGRAMS = Programs(ROOT)
PAPERS = {  # bits/dim on CIFAR-10, upper bounds: van den Oord et al. 2017, section 4.1
    "vae/cifar10_32": {"bits_per_dim_of_the_paper": 4.51, "note": "a larger net, until it converged"},
    "vqvae/cifar10_32": {
        "bits_per_dim_of_the_paper": 4.67,
        "note": "of 8x8x10 codes an image, ours of 8x8: the pixels alone cost more here",
    },
}
DATA_NOTE = "a re-compressed copy of CIFAR-10 (JPEG), whose last bits differ from the original's"
CAPTIONS, CANDIDATES, ALONE = 10, 6, 72  # prompts and images of each; images where there is no prompt
CURVES = ("psnr_db", "bits_per_dim", "codes_used", "disc_weight")  # sampled beside the loss, where a stage has them


def main() -> None:
    """Evaluate, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a config below configs/, without .yaml")
    parser.add_argument("--prior", nargs="*", default=[], help="configs of its priors; of several levels the top first")
    args = parser.parse_args()
    configs = {name: load(ROOT / f"configs/{name}.yaml") for name in (args.recipe, *args.prior)}
    runs = {name: Path(config.run) for name, config in configs.items()}
    for name, run in runs.items():
        if not (run / "export").exists():
            raise UserError(f"{run}: not trained to the end; first deepspeed launch/train.py configs/{name}.yaml")
    out = runs[args.recipe] / "result"
    valid = str(configs[args.recipe].data.valid)
    drawers = args.prior or ([args.recipe] if configs[args.recipe].stage == "vae" else [])
    shutil.rmtree(out / "samples", ignore_errors=True)  # sampling would continue with them, or refuse another model's
    PROGRAMS.run(evaluation(runs, args.recipe, args.prior, valid, out) | decoding(configs, runs, drawers, valid, out))
    [quality] = json.loads((out / "evaluation" / "comparison.json").read_text())["exports"]
    paper = {"paper": {**PAPERS[args.recipe], "data": DATA_NOTE}} if args.recipe in PAPERS else {}
    result = {
        "training": {name: training(run) for name, run in runs.items()},
        "held_out": {key: rounded(value) for key, value in quality.items() if key not in ("name", "export")},
        **paper,
        **describe(),
    }
    name = f"recipe_{args.recipe.replace('/', '_')}"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(args.recipe, runs, out, RESULTS / f"{name}.png")
    print(json.dumps(result, indent=1))


def evaluation(runs: dict[str, Path], recipe: str, priors: list[str], valid: str, out: Path) -> dict[str, Command]:
    """The command that measures the export on all held-out images."""
    options = [f"--prior={runs[name]}/export" for name in priors]
    return {
        "evaluate": PROGRAMS.python(
            "launch/evaluate.py", f"{runs[recipe]}/export", f"--data={valid}", f"--out={out}/evaluation", *options
        )
    }


def decoding(
    configs: dict[str, RunConfig], runs: dict[str, Path], drawers: list[str], valid: str, out: Path
) -> dict[str, Command]:
    """The commands that sample: from captions of held-out images where the model reads any, else from nothing."""
    if not drawers:
        return {}
    options = [*(f"--model={runs[name]}/export" for name in drawers), f"--out={out}/samples"]
    if not configs[drawers[0]].model.get("text_length", 0):
        return {"sample": PROGRAMS.python("launch/sample.py", *options, f"--candidates={ALONE}")}
    prompts = out / "prompts"
    pick = PROGRAMS.python("data_tools/pick_prompts.py", f"--data={valid}", f"--limit={CAPTIONS}", f"--out={prompts}")
    options += [f"--prompt-file={prompts}/prompts.jsonl", f"--candidates={CANDIDATES}"]
    return {"prompts": pick, "sample": PROGRAMS.python("launch/sample.py", *options)}


def training(run: Path) -> dict[str, Any]:
    """Command, steps, seconds between the first and the last line of the log, and the last validation."""
    rows = metrics(run)
    _, program, *arguments = shlex.split((run / "log").read_text().splitlines()[0])
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    valid = [row for row in rows if any(key.startswith("valid/") for key in row)][-1:]
    return {
        "command": PROGRAMS.typed(["deepspeed", "--num_gpus", "2", program, *arguments]),
        "steps": rows[-1]["step"],
        "seconds": round(rows[-1]["time_seconds"] - rows[0]["time_seconds"]),
        **{key: rounded(value) for row in valid for key, value in row.items() if key.startswith("valid/")},
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rounded(value: Any) -> Any:
    """Numbers to four places."""
    return round(value, 4) if isinstance(value, float) else value


def draw(recipe: str, runs: dict[str, Path], out: Path, path: Path) -> None:
    """Curves of every run above the reconstructions and the samples."""
    curves = [(name, key) for name, run in runs.items() for key in curve_names(run)]
    sheets = {"held-out images, what comes back below each": next((out / "evaluation").glob("recon*.png"), None)}
    sheets["samples"] = (out / "samples" / "grid.png") if (out / "samples").exists() else None
    shown = {title: np.asarray(Image.open(file)) for title, file in sheets.items() if file}
    width = 4.2 * len(curves)
    heights = [3.0, *(width * image.shape[0] / image.shape[1] / max(1, len(shown)) + 0.3 for image in shown.values())]
    figure = plt.figure(figsize=(width, heights[0] + max(heights[1:], default=0)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[heights[0], max(max(heights[1:], default=0), 0.1)])
    for axes, (name, key) in zip(np.atleast_1d(above.subplots(1, len(curves))), curves, strict=True):
        curve(axes, metrics(runs[name]), key)
        axes.set_title(name, fontsize=9)
    if shown:
        for axes, (title, image) in zip(np.atleast_1d(below.subplots(1, len(shown))), shown.items(), strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
            axes.set_anchor("N")
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a quarter of the bytes


def curve_names(run: Path) -> list[str]:
    """What to sample of a run: the loss and whatever else of CURVES it has."""
    names = {key.split("/", 1)[1] for row in metrics(run) for key in row if key.startswith(("train/", "valid/"))}
    return [name for name in ("loss", "model/loss") if name in names][:1] + [name for name in CURVES if name in names][
        :2
    ]


def curve(axes: plt.Axes, rows: list[dict[str, Any]], name: str) -> None:
    """One measure over the steps, while training and held out."""
    for part, style in (("train", "-"), ("valid", "o--")):
        points = [(row["step"], row[f"{part}/{name}"]) for row in rows if f"{part}/{name}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=part, markersize=3, linewidth=1.2)
    axes.set_xlabel("steps")
    axes.set_ylabel(name.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    log.guarded(main)
