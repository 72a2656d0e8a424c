"""Bytes that a rank holds for each parameter between two steps, gradients included, counted from live tensors.

    python benchmarks/static_bytes.py

A transformer of 13 million parameters (4 % of them in fp32) takes one step and the backward pass of a second; then
the storages of all tensors are counted once each, whoever holds them, and once more at the widest point of the
optimizer step. 16-bit states (`adamw16`) beside fp32 masters and moments, at ZeRO 1 to 3 on one rank and two, by the
real launcher. Writes benchmarks/results/static_bytes.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import describe
from slow_link_side import open_side, open_stage
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dalle_scale import config as configs
from dalle_scale import dist, log
from dalle_scale.config import RunConfig
from dalle_scale.engine import build, memory

HERE = Path(__file__).parent
MODEL = {"text_length": 0, "image_vocab": 512, "grid": 4, "width": 512, "layers": 4, "heads": 8}
CASES = [(kind, zero, ranks) for kind in ("adamw16", "adamw") for ranks in (1, 2) for zero in (1, 2, 3)]


def main() -> None:
    """Every case in processes of its own; write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows = []
    for kind, zero, ranks in log.progress(CASES, "measure", "cases", len(CASES)):
        with tempfile.NamedTemporaryFile() as file:
            launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--num_gpus", str(ranks)]
            command = [*launcher, "--master_port", "29618", __file__, kind, str(zero), file.name]
            subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, check=True)
            rows.append(json.loads(Path(file.name).read_text()))
    result = {"model": MODEL, "cases": rows, **describe()}
    (HERE / "results" / "static_bytes.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        held, planned, widest = (row[key] for key in ("bytes_a_parameter", "planned", "in_the_step"))
        numbers = f"{held:6.2f}  planned {planned:6.2f}  in the step {widest:6.2f}"
        log.say(f"{row['kind']:<8} ZeRO {row['zero']}, {row['ranks']} ranks: {numbers}")


def rank(kind: str, zero: int, path: Path) -> None:
    """On each rank: train and count; rank 0 writes."""
    build.start()
    tree = {"stage": "dalle", "run": "none", "steps": 10, "global_batch_size": 2 * dist.world_size(), "model": MODEL}
    tree |= {"data": {"train": "none"}, "optim": {"model": {"kind": kind, "lr": 1e-3}}}
    tree |= {"engine": {"zero": zero, "dtype": "bf16"}}
    config = configs.parse(RunConfig, tree, where="static_bytes.py")
    stage = open_stage(config)
    plain = stage.nets()["model"]
    count = sum(parameter.numel() for parameter in plain.parameters())
    planned = memory.estimate(plain, config, "model", dist.world_size())
    del plain
    trained_nets = open_side(config, stage, 0).trained_nets
    batch = {"codes": torch.zeros(2, MODEL["grid"] ** 2, dtype=torch.int64), "weight": torch.ones(2)}
    widest: list[int] = []
    register_optimizer_step_pre_hook(lambda *_: widest.append(live_bytes()))
    for update in range(2):
        with trained_nets.updating("model") as nets:
            trained_nets["model"].backward(stage.loss("model", nets, batch, update).total)
        held = live_bytes()
        widest.clear()
        trained_nets["model"].step(update)
    row = {
        "kind": kind,
        "zero": zero,
        "ranks": dist.world_size(),
        "parameters": count,
        "bytes_a_parameter": round(held / count, 3),
        "planned": round(sum(planned.values()) / count, 3),
        "in_the_step": round(max(widest) / count, 3),
    }
    if dist.is_main():
        path.write_text(json.dumps(row))


def live_bytes() -> int:
    """Bytes of the storages of all tensors, each once."""
    gc.unfreeze()  # build.build hides what it has made from the collector, and so from this
    gc.collect()
    found: list[Any] = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in found)}.values())


if __name__ == "__main__":
    if "RANK" in os.environ:
        log.guarded(lambda: rank(sys.argv[-3], int(sys.argv[-2]), Path(sys.argv[-1])))
    else:
        log.guarded(main)
