"""Train any stage.

    deepspeed --num_gpus 2 launch/train.py configs/demo/dvae.yaml optim.model.lr=3e-4 engine.zero=2
    deepspeed launch/train.py configs/demo/dvae.yaml --dry-run

Config, data and checkpoint are checked before anything is allocated. The same command resumes a stopped run. `python
launch/train.py ...` trains with one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dalle_scale import config as configs
from dalle_scale import dist, log, rank_log, stages
from dalle_scale.arguments import Parser
from dalle_scale.checkpoint import export, resume
from dalle_scale.config import DataSource, RunConfig
from dalle_scale.data.pipeline import Stream, open_stream
from dalle_scale.engine import ds_config, memory, precision
from dalle_scale.types import Batch, Stage


def main() -> None:
    """Check, then build, then train."""
    args = parse_args()
    config = configs.load(args.config, args.overrides)
    ds_config.check(config, dist.world_size(), None if args.dry_run else dist.device())
    stage = open_stage(config, with_tokenizer=not args.dry_run)
    with torch.device("meta"):
        shapes = stage.nets()
    ds_config.check_nets(config, shapes)
    if args.dry_run:
        config, _ = precision.resolve(config, shapes)
        log.say(memory.report(config, shapes, stage.flops_per_sample(), dist.world_size()))
        return
    train = open_data(config, stage, config.data.train, train=True)
    valid = open_data(config, stage, config.data.valid, train=False) if config.data.valid else None
    folder = Path(config.run)
    checkpoint = resume.find(folder, args.resume)
    if checkpoint:
        resume.check(checkpoint, config, dist.world_size())
        train.check(checkpoint.stream)
    rank_log.start(folder)

    from dalle_scale.engine import build  # imports deepspeed
    from dalle_scale.train import Trainer

    build.start()
    rank_log.watch()
    config, note = precision.resolve(config, shapes, checkpoint.config["engine"]["dtype"] if checkpoint else None)
    if dist.is_main():
        configs.dump(config, folder / "config.yaml", note)
    dist.seed_everything(config.seed, step=-1)
    nets = stage.nets()
    if checkpoint is None and dist.is_main():
        stage.initialize(nets, all_batches(open_data(config, stage, config.data.train, train=True, alone=True)))
    build.share(nets)
    trained_nets = build.build(config, nets)
    if checkpoint:
        resume.load(checkpoint, trained_nets)
        log.say(f"{folder}: resumes from {checkpoint.folder}, step {checkpoint.step}")
    Trainer(config, stage, trained_nets, train, valid, export_parts(config), checkpoint.step if checkpoint else 0).run()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.model.lr=3e-4")
    parser.add_argument("--resume", default="auto", metavar="auto|no|FOLDER", help="checkpoint to resume from")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters, FLOPs and memory, and stop")
    parser.add_local_rank()
    return parser.parse_args()


def open_stage(config: RunConfig, with_tokenizer: bool) -> Stage:
    """The stage with its own config and the image tokenizer below it."""
    stage_class = stages.resolve(config.stage)
    model_config = configs.parse(stage_class.Config, config.model, where="model")
    path = config.tokenizer if with_tokenizer else None
    return stage_class(model_config, export.open_upstream(path, stage_class, dist.device()) if path else None)


def open_data(config: RunConfig, stage: Stage, source: DataSource, train: bool, alone: bool = False) -> Stream:
    """This rank's share of a data set, or all of it (`alone`)."""
    world_size = 1 if alone else dist.world_size()
    return open_stream(
        config.data,
        source,
        stage.inputs,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.global_batch_size if alone else config.micro_batch_size(world_size),
        rank=0 if alone else dist.rank(),
        world_size=world_size,
        train=train,
        ledger=Path(config.run) / "ledger.jsonl",
    )


def all_batches(stream: Stream) -> Iterator[Batch]:
    """Whole global batches without end."""
    for (batch,) in stream.batches(0, sys.maxsize):
        yield batch


def export_parts(config: RunConfig) -> dict[str, Path]:
    """Parts of an export besides weights. A text tokenizer that is a name, not a path, is left out."""
    paths = {"text_tokenizer": config.data.text_tokenizer, "tokenizer": config.tokenizer}
    return {name: Path(path) for name, path in paths.items() if path and Path(path).exists()}


if __name__ == "__main__":
    log.guarded(main)
