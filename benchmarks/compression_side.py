"""One of the four ranks of compression.py: two nodes of two ranks each, fp32, ZeRO 3 inside a node.

Two engines of the same net take every step in turn on the same batch: `exact` averages its gradients between the
nodes as they are, `compressed` with PowerSGD.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from slow_link_side import open_side, open_stage
from torch import nn
from toy_tokens import SIZES, photographs, scenes

from dalle_scale import config as configs
from dalle_scale import dist, log
from dalle_scale.cluster import plan
from dalle_scale.config import RunConfig
from dalle_scale.engine import build
from dalle_scale.types import Batch, Stage

SCENES, HELD_OUT, BATCH_SIZE = 8_192, 256, 32
LEFT = 0.15  # of the bytes between nodes
# Wide and deep enough that the share of bytes leaves a rank to compare with the paper's: it grows with the width, and
# embeddings, which travel whole, take 1.7 % of the numbers here, 1.6 % of the paper's 12 billion
SCHEDULE = {"kind": "cosine", "warmup_steps": 50}
TREE = {
    "stage": "dalle",
    "run": "none",
    "global_batch_size": BATCH_SIZE,
    "model": {**SIZES, "width": 256, "layers": 6, "heads": 4, "attention": ["row", "conv"]},
    "data": {"train": "none"},
    "optim": {
        "model": {"lr": 1e-3, "betas": [0.9, 0.96], "weight_decay": 0.045, "clip_norm": 4.0, "schedule": SCHEDULE}
    },
    "engine": {"zero": 3, "nodes": 2, "dtype": "fp32"},
}


def main() -> None:
    """Train what the folder of the command line plans; rank 0 writes the losses there."""
    folder = Path(sys.argv[-1])
    asked = json.loads((folder / "plan.json").read_text())
    steps: int = asked["steps"]
    build.start()
    config = configs.parse(RunConfig, {**TREE, "steps": steps}, where="compression_side.py")
    stage = open_stage(config)
    rank = largest_rank(config, stage.nets()["model"])
    sides = {name: open_side(config, stage, r).trained_nets for name, r in (("exact", 0), ("compressed", rank))}
    text, codes = photographs(Path(asked["images"]), SCENES) if asked["images"] else scenes(SCENES)
    order = torch.Generator().manual_seed(0)
    curves: dict[str, list[float]] = {name: [] for name in sides}
    for number in log.progress(range(steps), "train", "steps", steps):
        rows = torch.randint(HELD_OUT, SCENES, (BATCH_SIZE,), generator=order)
        batch = share({"text": text[rows], "codes": codes[rows]})
        for name, trained_nets in sides.items():
            dist.seed_everything(config.seed, number)
            curves[name].append(step(stage, trained_nets, batch, number))
    held_out = share({"text": text[:HELD_OUT], "codes": codes[:HELD_OUT]})
    result = {
        "parameters": sum(p.ds_numel for p in sides["exact"]["model"].module.parameters()),
        "compression_rank": rank,
        "held_out_nats": {name: evaluate(stage, trained_nets, held_out, steps) for name, trained_nets in sides.items()},
        "mib_between_machines": {n: trained_nets.numbers()["between_nodes_mib"] for n, trained_nets in sides.items()},
        "curves": curves,
    }
    if dist.is_main():
        (folder / "result.json").write_text(json.dumps(result))


def largest_rank(config: RunConfig, net: nn.Module) -> int:
    """The largest with which a rank averages at most `LEFT` of its bytes, those of embeddings and gains included."""

    def averaged(rank: int) -> float:
        engine = config.engine.model_copy(update={"compression_rank": rank})
        changed = config.model_copy(update={"engine": engine})
        return plan.between_nodes_bytes(changed, net, "model", dist.world_size())

    return max(rank for rank in range(1, 64) if averaged(rank) <= LEFT * averaged(0))


def share(whole: dict[str, torch.Tensor]) -> Batch:
    """This rank's samples."""
    batch = {name: tensor.chunk(dist.world_size())[dist.rank()] for name, tensor in whole.items()}
    return {**batch, "weight": torch.ones(len(batch["codes"]))}


def step(stage: Stage, trained_nets: build.TrainedNets, batch: Batch, number: int) -> float:
    """One step; its loss over all ranks."""
    with trained_nets.updating("model") as nets:
        total = stage.loss("model", nets, batch, number).total
        trained_nets["model"].backward(total)
    trained_nets["model"].step(number)
    return dist.all_reduce(total.detach().clone(), "mean").item()


def evaluate(stage: Stage, trained_nets: build.TrainedNets, batch: Batch, number: int) -> float:
    """The loss over all ranks, without dropout."""
    with trained_nets.evaluating() as nets:
        loss: Any = stage.loss("model", nets, batch, number).total
    return dist.all_reduce(loss.clone(), "mean").item()


if __name__ == "__main__":
    log.guarded(main)
