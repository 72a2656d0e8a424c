"""The main job from nothing to an image, on a small world: what `make demo` runs.

    python launch/demo.py --minutes 8

Every step is a program that you would run on your own data in the same way; this script only calls them in order,
prints each command, and times it. More minutes buy more steps of the transformer and of CLIP, nothing else.
Writes runs/demo below the current folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from dalle_scale import log
from dalle_scale.arguments import Parser
from dalle_scale.programs import Command, Programs, processes
from dalle_scale.types import UserError

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Programs(ROOT)
RUN = Path("runs/demo")
BASE_MINUTES = 8.0
FIXED_MINUTES = 2.5  # of it not spent on the steps that more minutes multiply


@dataclass(frozen=True)
class Size:
    """Size of a demo."""

    train_samples: int = 24_000
    prompts: int = 128
    dvae_steps: int = 200
    dalle_steps: int = 7_600
    clip_steps: int = 600


def size_for(minutes: float) -> Size:
    """Size that fits into so many minutes on two idle cores."""
    share = (minutes - FIXED_MINUTES) / (BASE_MINUTES - FIXED_MINUTES)
    return Size(dalle_steps=round(Size.dalle_steps * share), clip_steps=round(Size.clip_steps * share))


TINY = Size(train_samples=512, prompts=4, dvae_steps=6, dalle_steps=6, clip_steps=6)


def steps(size: Size) -> dict[str, Command]:
    """The commands of the demo, by the name of the step."""
    python = PROGRAMS.python

    def train(stage: str, steps: int) -> Command:
        return PROGRAMS.deepspeed("launch/train.py", str(ROOT / f"configs/demo/{stage}.yaml"), f"steps={steps}")

    def encode(split: str) -> Command:
        shards, out = f"--data={RUN}/world/{split}", f"--out={RUN}/codes/{split}"
        return python("launch/encode.py", f"--tokenizer={RUN}/dvae/export", shards, out)

    make_world = [f"--out={RUN}/world", f"--train={size.train_samples}", f"--prompts={size.prompts}"]
    text_tokenizer = [f"--data={RUN}/world/train", "--vocab=448", f"--out={RUN}"]
    sample = [f"--model={RUN}/dalle/export", f"--prompt-file={RUN}/world/prompts.jsonl", f"--out={RUN}/samples"]
    rerank = [f"--samples={RUN}/samples", f"--clip={RUN}/clip/export", "--keep=1", f"--out={RUN}/reranked"]
    return {
        "shards": python("data_tools/make_toy_world.py", *make_world),
        "text_tokenizer": python("data_tools/train_tokenizer.py", *text_tokenizer),
        "dvae": train("dvae", size.dvae_steps),
        "encode": encode("train"),
        "encode_valid": encode("valid"),
        "transformer": train("dalle", size.dalle_steps),
        "clip": train("clip", size.clip_steps),
        "sample": python("launch/sample.py", *sample, "--candidates=16", "--batch-size=1024"),
        "rerank": python("launch/rerank.py", *rerank),
        "report": python("data_tools/report_toy_world.py", f"--run={RUN}"),
    }


def main() -> None:
    """Run all steps, then add the seconds of each to the report."""
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=BASE_MINUTES, help="time to aim at on two idle cores")
    parser.add_argument("--tiny", action="store_true", help="a minute's run that only shows that every step works")
    options = parser.parse_args()
    if options.minutes <= FIXED_MINUTES:
        raise UserError(f"--minutes: {options.minutes} is too short; take more than {FIXED_MINUTES}")
    if RUN.exists():
        print(f"Removing {RUN} of an earlier run: the demo starts from scratch.")
        shutil.rmtree(RUN)
    how = "2 processes, which is faster than one process of two threads" if processes() == 2 else "1 process"
    print(f"Training in {how}.")
    seconds = PROGRAMS.run(steps(TINY if options.tiny else size_for(options.minutes)))
    path = RUN / "report.json"
    report = {**json.loads(path.read_text(encoding="utf-8")), "seconds": seconds}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    print(f"\nOpen {RUN / 'gallery.png'} (or {RUN / 'gallery.html'} in a browser).")


if __name__ == "__main__":
    log.guarded(main)
