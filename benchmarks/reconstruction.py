"""What an image tokenizer makes of images it has not seen: PSNR, codes used, perplexity, a grid of reconstructions.

    python benchmarks/reconstruction.py --run runs/cifar10_32/dvae --shards runs/cifar10_32/shards/valid --name cifar10

Reads <run>/export, and <run>/log and metrics.jsonl for the command and the training time. Writes
benchmarks/results/<name>.json and <name>.png (pairs of rows: originals, reconstructions from hard codes).
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import cast

import torch
from environment import ROOT, describe

from dalle_scale import log
from dalle_scale.checkpoint import export
from dalle_scale.config import DataConfig
from dalle_scale.data.pipeline import open_stream
from dalle_scale.programs import Programs
from dalle_scale.stages import dvae

RESULTS = Path(__file__).parent / "results"
COLUMNS = 12
BATCH_SIZE = 60


def main() -> None:
    """Evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a dvae run")
    parser.add_argument("--shards", required=True, help="held-out data set")
    parser.add_argument("--name", required=True, help="name of the result files")
    args = parser.parse_args()
    opened = export.load(args.run / "export")
    stage = cast(dvae.Stage, opened.stage)
    stream = open_stream(
        DataConfig(train=args.shards),
        args.shards,
        stage.inputs,
        seed=0,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        rank=0,
        world_size=1,
        train=False,
        ledger=None,
    )
    with torch.inference_mode():
        batches = (batch for parts in stream.batches(0, stream.batches_per_epoch) for batch in parts)
        bar = log.progress(batches, "evaluate", "batches", stream.batches_per_epoch)
        quality = stage.evaluate(opened.nets, bar)
        every = torch.cat([batch["image"] for [batch] in stream.batches(0, stream.batches_per_epoch)])
        images = every[torch.linspace(0, stream.num_samples - 1, 2 * COLUMNS).long()]
        tokenizer = stage.tokenizer(opened.nets)
        reconstructions = tokenizer.decode(tokenizer.encode(images))
    pairs = torch.cat([part[row : row + COLUMNS] for row in (0, COLUMNS) for part in (images, reconstructions)])
    sheet = log.grid(pairs, columns=COLUMNS)
    zoom = max(1, round(64 / images.shape[-1]))
    RESULTS.mkdir(exist_ok=True)
    sheet.resize((sheet.width * zoom, sheet.height * zoom), 0).save(RESULTS / f"{args.name}.png", optimize=True)
    result = {
        "training": training(args.run),
        "images": stream.num_samples,
        **{name: round(value, 4) for name, value in quality.items()},
        **describe(),
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def training(run: Path) -> dict[str, object]:
    """How the tokenizer was trained: command, steps, seconds between the first and the last line of the log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    _, program, *arguments = shlex.split((run / "log").read_text().splitlines()[0])
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    return {
        "command": Programs(ROOT).typed(["deepspeed", program, *arguments]),
        "steps": rows[-1]["step"],
        "seconds": round(rows[-1]["time_seconds"] - rows[0]["time_seconds"]),
    }


if __name__ == "__main__":
    log.guarded(main)
