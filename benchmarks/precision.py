"""fp32 beside bf16 on this machine: steps of training, sampling, encoding.

    python benchmarks/precision.py                      # all of CASES, in some minutes
    python benchmarks/precision.py transformer dvae     # only those whose names begin so

Training runs the stage's loss, the engine, optimizer and average of the recipe, as launch/train.py does, on random
images, captions and codes. Both precisions take turns in one process, on all cores; a figure is the median of its
rounds. "auto" is what `engine.dtype: auto` chose for the recipe here, and its gain the seconds of fp32 by those of its
choice. Writes benchmarks/results/precision_<processor>.json, a case as soon as it is measured; those of other machines
stay beside it. Rates are of matrix products at a net's own sizes, as the program measures them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from environment import ROOT, describe, processor

from dalle_scale import config as configs
from dalle_scale import dist, stages
from dalle_scale.config import RunConfig
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.nn import precision
from dalle_scale.types import Batch, BatchSpec, Stage

SECONDS = 4.0  # of measuring a case, about
TYPES = ("fp32", "bf16")
CANDIDATES = 16
BIG = ["model.layers=8", "model.width=512", "model.heads=8", "model.grid=16", "model.text_length=32"]
BIG += ["global_batch_size=4", "engine.micro_batch_size=4", "engine.activation_checkpointing=false", "engine.zero=0"]
FULL, SMALL = "model.attention=[full]", ["engine.zero=0", "engine.micro_batch_size=null"]


@dataclass(frozen=True)
class Case:
    """A recipe, changed to what a machine does in a second."""

    recipe: str
    changes: tuple[str, ...] = ()
    what: str = "train"  # or "sample", "encode", "decode"


def cases() -> dict[str, Case]:
    """By name."""
    emoji, wide = "dvae/noto_emoji_64", ("model.width=128", "global_batch_size=8")
    stem = ("model.image_size=64", "model.n_hid=64", "global_batch_size=4", *SMALL)
    base = (
        "model.width=384",
        "model.layers=6",
        "model.heads=6",
        "global_batch_size=16",
        "model.text_width=256",
        *SMALL,
    )
    return {
        "transformer_full": Case("dalle/small_256", (*BIG, FULL)),
        "transformer_sparse": Case("dalle/small_256", tuple(BIG)),
        "transformer_cifar10": Case("dalle/cifar10_32"),
        "transformer_demo": Case("demo/dalle"),
        "dvae_patch": Case("dvae/cifar10_32"),
        "dvae_demo": Case("demo/dvae"),
        "dvae_stem": Case("dvae/paper_256", stem),
        "vae": Case("vae/cifar10_32"),
        "vqvae": Case("vqvae/cifar10_32"),
        "vqvae2": Case("vqvae2/noto_emoji_128"),
        "vqgan": Case("vqgan/cifar10_32"),
        "vqgan_wide": Case("vqgan/cifar10_32", wide),
        "unet": Case("ddpm/cifar10_32"),
        "unet_wide": Case("ddpm/cifar10_32", wide),
        "pixelsnail": Case("vqvae2_prior/noto_emoji_128_top"),
        "clip": Case("clip/cifar10_32"),
        "clip_base": Case("clip/base_224", base),
        "clip_demo": Case("demo/clip"),
        "sample_transformer_full": Case("dalle/small_256", (*BIG, FULL), "sample"),
        "sample_transformer_sparse": Case("dalle/small_256", tuple(BIG), "sample"),
        "encode_patch": Case(emoji, what="encode"),
        "encode_stem": Case("dvae/paper_256", (*stem, "model.image_size=256", "global_batch_size=2"), "encode"),
        "decode_stem": Case("dvae/paper_256", (*stem, "model.image_size=256", "global_batch_size=2"), "decode"),
    }


def main() -> None:
    """Measure each case, print it, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names of cases; default: all")
    parser.add_argument("--trial", action="store_true", help="write nothing")
    args = parser.parse_args()
    from dalle_scale.engine import build

    build.start()
    name, flags = processor()
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    amx = "_amx" if "amx_bf16" in flags else ""
    path = ROOT / "benchmarks" / "results" / f"precision_{slug}{amx}.json"
    for case_name, case in cases().items():
        if not args.names or any(case_name.startswith(start) for start in args.names):
            row = measure(case)
            print(f"{case_name:<28}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if not args.trial:
                rows = json.loads(path.read_text())["cases"] if path.exists() else {}
                result = {**describe(), "threads": torch.get_num_threads(), "cases": rows | {case_name: row}}
                path.write_text(json.dumps(result, indent=1) + "\n")


def measure(case: Case) -> dict[str, Any]:
    """Seconds of a step in each precision, by turns, and what auto makes of it."""
    make = {"train": step_of_training, "sample": step_of_sampling}.get(case.what, step_of_coding)
    steps = {dtype: make(case, load(case, dtype), dtype) for dtype in TYPES}
    seconds: dict[str, list[float]] = {dtype: [] for dtype in TYPES}
    for step in steps.values():
        step(), step()
    began = time.perf_counter()
    repeated = max(1, round(0.1 / timed(steps["fp32"], 1)))
    while time.perf_counter() - began < SECONDS or len(seconds["fp32"]) < 3:
        for dtype, step in steps.items():
            seconds[dtype].append(timed(step, repeated))
    found = {dtype: statistics.median(values) for dtype, values in seconds.items()}
    with torch.device("meta"):
        nets = open_stage(load(case, "fp32")).nets()
    chosen = precision.choose(nets.values(), torch.device("cpu")).dtype
    return {
        **{f"{dtype}_seconds": round(value, 5) for dtype, value in found.items()},
        "bf16_gain": round(found["fp32"] / found["bf16"], 2),
        "auto": chosen,
        "auto_gain": round(found["fp32"] / found[chosen], 2),
        "gflops": {
            k: round(rate / 1e9) for k, rate in precision.matrix_rates(nets.values(), torch.device("cpu")).items()
        },
        "rounds": len(seconds["fp32"]),
    }


def timed(step: Callable[[], object], times: int) -> float:
    """Mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - began) / times


def load(case: Case, dtype: str) -> RunConfig:
    """The recipe in a precision."""
    return configs.load(ROOT / "configs" / f"{case.recipe}.yaml", [*case.changes, f"engine.dtype={dtype}"])


def open_stage(config: RunConfig) -> Stage:
    """Without a tokenizer below it."""
    kind = stages.resolve(config.stage)
    return kind(configs.parse(kind.Config, config.model, where="model"))


def step_of_training(case: Case, config: RunConfig, dtype: str) -> Callable[[], object]:
    """A function that makes one step."""
    from dalle_scale.engine import build
    from dalle_scale.train import Trainer

    stage = open_stage(config)
    dist.seed_everything(0, step=-1)
    trained_nets = build.build(config, stage.nets())
    trainer = Trainer(config, stage, trained_nets, None, None, {}, done=1_000)  # type: ignore[arg-type]
    return partial(trainer._update, [random_batch(stage.inputs, config.global_batch_size)])


def step_of_sampling(case: Case, config: RunConfig, dtype: str) -> Callable[[], object]:
    """A function that draws the codes of CANDIDATES images of one caption."""
    net = cast(Transformer, open_stage(config).nets()["model"].eval().requires_grad_(False))
    precision.cast({"model": net}, torch.device("cpu"), dtype)
    net.store_by_columns()  # as sampling has it on CPUs
    text, codes = torch.zeros(1, net.text_length, dtype=torch.int64), torch.zeros(CANDIDATES, dtype=torch.int64)

    @torch.inference_mode()
    def step() -> None:
        _, decoding = net.prefill(text, torch.zeros_like(codes))
        for index in range(net.layout.grid**2 - 1):
            net.decode_step(codes, index, decoding)

    return step


def step_of_coding(case: Case, config: RunConfig, dtype: str) -> Callable[[], object]:
    """A function that encodes a batch, or decodes one."""
    stage = open_stage(config)
    nets = {name: net.eval().requires_grad_(False) for name, net in stage.nets().items()}
    precision.cast(nets, torch.device("cpu"), dtype)
    tokenizer = stage.tokenizer(nets)  # type: ignore[attr-defined]
    images = random_batch(stage.inputs, config.global_batch_size)["image"]
    codes = tokenizer.encode(images)
    return partial(tokenizer.encode, images) if case.what == "encode" else partial(tokenizer.decode, codes)


def random_batch(inputs: BatchSpec, samples: int) -> Batch:
    """Noise at the right sizes."""
    batch = {"id": torch.arange(samples), "seed": torch.arange(samples), "weight": torch.ones(samples)}
    if inputs.image_size:
        shape = (samples, inputs.image_size, inputs.image_size, 3)
        batch["image"] = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    if inputs.text_length:
        batch["text"] = torch.randint(0, inputs.text_vocab, (samples, inputs.text_length))
    if inputs.num_codes:
        batch["codes"] = torch.randint(0, inputs.code_vocab, (samples, inputs.num_codes))
    return batch


if __name__ == "__main__":
    main()
