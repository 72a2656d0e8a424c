"""A small transformer with 16-bit weights and states against the same in fp32, and what goes wrong in fp16.

    python benchmarks/sixteen_bits.py
    python benchmarks/sixteen_bits.py --images cifar10_train.tar

For each seed all cases see the same batches (captions and 8x8 colours of the toy world, or of photographs in a tar with
a folder for each class) from the same initial weights, and the learning rate ends at 0. Two equal runs that differ in
the last place of one number drift apart, so a control shows how far: fp32 again, from weights that were rounded to bf16
once. The rules are those of the program, `engine.adam16.AdamW16` and `engine.scaling.Scaling` on
`nn.transformer.Transformer`, in one process without DeepSpeed. Few CPUs have products of 16-bit matrices, so these are
computed in fp32 and rounded, which is what tensor cores do. "fp32 masters" is otherwise: DeepSpeed's engine as
`engine.dtype: bf16` builds it, with AdamW and the processor's own products.

The fp16 runs have two hardships that small models do not have by themselves: the loss is divided by 256, as by
accumulation over 256 micro-batches, and in every 60th step the gradient of one block overflows (the paper skips 5 %
of its steps for such reasons). "one scale" multiplies the loss by one number: 2^16 at first, halved at an overflow,
doubled after 1,000 steps without (DeepSpeed's rule). Writes benchmarks/results/sixteen_bits.json and .png, or
sixteen_bits_images.json and .png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from environment import ROOT, describe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_tokens import SIZES, photographs, scenes
from tqdm import tqdm

from dalle_scale.config import DataConfig, EngineConfig, OptimConfig, RunConfig
from dalle_scale.engine import optim
from dalle_scale.engine.scaling import Scaling
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.nn.residual_scaling import HALF_TYPES, branches_of, cast, in_16_bits

STEPS, SEEDS, BATCH = 2_000, 4, 8
IMAGES, HELD_OUT = 8_192, 256
MICRO_BATCHES, OVERFLOW_EVERY, OVERFLOWING_BLOCK = 256, 60, 2
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.96), "weight_decay": 0.045, "clip_norm": 1.0}
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Case:
    """One training run."""

    name: str
    dtype: str = "fp32"
    states: str = "paper"
    rounding: str = "stochastic"
    one_scale: bool = False
    start_rounded: bool = False
    engine: bool = False  # DeepSpeed's, with fp32 masters


CASES = (
    Case("fp32"),
    Case("fp32 from rounded weights (control)", start_rounded=True),
    Case("bf16, states of the paper, stochastic", "bf16"),
    Case("bf16, states of the paper, compensated", "bf16", rounding="compensated"),
    Case("bf16, bf16 states, stochastic", "bf16", states="bf16"),
    Case("bf16, states of the paper, to nearest", "bf16", rounding="nearest"),
    Case("fp16, a scale a branch, stochastic", "fp16"),
    Case("fp16, a scale a branch, compensated", "fp16", rounding="compensated"),
    Case("fp16, one scale", "fp16", one_scale=True),
    Case("bf16, fp32 masters", "bf16", engine=True),
)


def main() -> None:
    """Train all cases, two at a time; write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--images", type=Path, metavar="TAR", help="in place of the toy world")
    which = "only these of CASES beside fp32, which is number 0; nothing is written"
    parser.add_argument("--cases", type=int, nargs="+", choices=range(1, len(CASES)), metavar="N", help=which)
    args = parser.parse_args()
    chosen = CASES if args.cases is None else [CASES[0], *(CASES[number] for number in args.cases)]
    jobs = [(case, seed, args.steps, args.images) for seed in range(args.seeds) for case in chosen]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        runs = list(tqdm(pool.imap(run, jobs), total=len(jobs), desc="runs"))
    by_case = [runs[start :: len(chosen)] for start in range(len(chosen))]
    cases = [summary(case, mine, by_case[0]) for case, mine in zip(chosen, by_case, strict=True)]
    for row in cases:
        numbers = f"by fp32 {row['by_fp32']:7.4f} +- {row['standard_error']:6.4f}  skipped {row['skipped_steps']}"
        print(f"{row['name']:<42}{numbers}")
    if args.cases is None:
        keep(args, cases, by_case)


def keep(args: argparse.Namespace, cases: list[dict[str, Any]], by_case: list[list[dict[str, Any]]]) -> None:
    """Write the result and the plot."""
    result = {
        "steps": args.steps,
        "seeds": args.seeds,
        "parameters": sum(p.numel() for p in fresh_net(0).parameters()),
        "cases": cases,
        **describe(),
    }
    name = RESULTS / ("sixteen_bits_images" if args.images else "sixteen_bits")
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(cases, by_case, name.with_suffix(".png"))


def summary(case: Case, runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses of a case over the seeds, each divided by that of fp32 with the same seed."""
    ratios = [mine["held_out_nats"] / theirs["held_out_nats"] for mine, theirs in zip(runs, reference, strict=True)]
    return {
        "name": case.name,
        "held_out_nats": [run["held_out_nats"] for run in runs],
        "by_fp32": round(float(np.mean(ratios)), 5),
        "standard_error": round(float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5, 5) if len(ratios) > 1 else 0.0,
        "skipped_steps": [run["skipped_steps"] for run in runs],
        "seconds": [run["seconds"] for run in runs],
    }


def run(job: tuple[Case, int, int, Path | None]) -> dict[str, Any]:
    """Train one case with a seed; its curve and its loss on held-out images, in nats a token."""
    case, seed, steps, images = job
    torch.set_num_threads(1)
    text, codes = photographs(images, IMAGES) if images else scenes(IMAGES)
    net = fresh_net(seed)
    if case.start_rounded:
        for parameter in in_16_bits(net):
            parameter.data = parameter.data.bfloat16().float()
    if case.dtype != "fp32" and not case.engine:
        cast(net, case.dtype)
    began = time.perf_counter()
    way = train_in_engine if case.engine else train
    curve, skipped = way(net, case, seed, steps, text[HELD_OUT:], codes[HELD_OUT:])
    with torch.no_grad(), nullcontext() if case.engine else ProductsInFp32():
        held_out = loss_of(net, text[:HELD_OUT], codes[:HELD_OUT]).item()
    return {
        "held_out_nats": round(held_out, 5),
        "skipped_steps": skipped,
        "seconds": round(time.perf_counter() - began),
        "curve": curve,
    }


def train(net: Transformer, case: Case, seed: int, steps: int, text: Tensor, codes: Tensor) -> tuple[list[float], int]:
    """Losses in nats a token, and how many steps were skipped."""
    short = case.dtype != "fp32"
    rules: dict[str, Any] = {"states": case.states, "rounding": case.rounding} if short else {}
    config = OptimConfig(kind="adamw16" if short else "adamw", **ADAM, **rules)
    optimizer = optim.build(net, config)
    flats = flattened(optimizer) if short else []
    hard = case.dtype == "fp16"
    divided = MICRO_BATCHES if hard else 1
    scaler: Any = OneScale() if case.one_scale else BranchScales(net, hard, config.clip_norm)
    overflow = Overflow(net.blocks[OVERFLOWING_BLOCK]) if hard else None
    order, curve, skipped = torch.Generator().manual_seed(seed), [], 0
    for step in range(steps):
        optim.set_lr(optimizer, lr_factor(step, steps))
        rows = torch.randint(0, len(text), (BATCH,), generator=order)
        if overflow is not None:
            overflow.now = step % OVERFLOW_EVERY == OVERFLOW_EVERY - 1
        with ProductsInFp32():
            loss = loss_of(net, text[rows], codes[rows])
            (loss / divided * scaler.of_loss).backward()
        curve.append(loss.item())
        for flat, parameters in flats:
            flat.grad = torch.cat([parameter.grad.flatten() for parameter in parameters])
        if short:
            taken = scaler.prepare(optimizer.param_groups, divided, config.clip_norm)
        else:
            nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            taken = True
        if taken:
            optimizer.step()
        skipped += not taken
        net.zero_grad()
    return curve, skipped


def train_in_engine(
    net: Transformer, case: Case, seed: int, steps: int, text: Tensor, codes: Tensor
) -> tuple[list[float], int]:
    """The same batches and learning rates through the engine that a run has."""
    from dalle_scale.engine import build  # imports deepspeed

    build.start()
    torch.set_num_threads(1)
    config = RunConfig(
        stage="dalle",
        run="",
        steps=steps,
        global_batch_size=BATCH,
        data=DataConfig(train=""),
        optim={"model": OptimConfig(**ADAM)},
        engine=EngineConfig(dtype=case.dtype),  # type: ignore[arg-type]
    )
    engine = build.build(config, {"model": net})["model"].engine
    order, curve = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        optim.set_lr(engine.optimizer, lr_factor(step, steps))
        rows = torch.randint(0, len(text), (BATCH,), generator=order)
        loss = loss_of(engine, text[rows], codes[rows])
        engine.backward(loss)
        engine.step()
        curve.append(loss.item())
    return curve, 0


def lr_factor(step: int, steps: int) -> float:
    """Of the peak, at a step counted from 0: linear over the first 100, then down to 0."""
    return min(1.0, (step + 1) / 100) * (1 + float(np.cos(np.pi * step / steps))) / 2


def flattened(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, list[Tensor]]]:
    """Make the parameters of each group one flat tensor for the optimizer, as ZeRO does: it with its parameters."""
    found = []
    for group in optimizer.param_groups:
        parameters = group["params"]
        flat = torch.cat([parameter.data.flatten() for parameter in parameters])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view(parameter.shape)
        group["params"] = [flat]
        found.append((flat, parameters))
    return found


class BranchScales:
    """The program's own."""

    of_loss = 1.0

    def __init__(self, net: Transformer, dynamic: bool, clip_norm: float) -> None:
        self.scaling = Scaling([scale for scale, _ in branches_of(net)], dynamic, clip_norm)

    def prepare(self, groups: list[dict[str, Any]], divided: int, clip_norm: float) -> bool:
        """Set the divisors; whether to take the step."""
        self.scaling.clip_norm = clip_norm / divided  # of gradients that are so much smaller
        finite = self.scaling.finite(gradients(groups))
        taken = self.scaling.apply(groups, gradients(groups), finite, lambda tensor: tensor)
        for group in groups:
            group["gradient_divisor"] /= divided
        return taken


class OneScale:
    """One scale of the loss for all gradients, by DeepSpeed's rule."""

    def __init__(self) -> None:
        self.of_loss, self.patience, self.clean = 2.0**16, 2, 0

    def prepare(self, groups: list[dict[str, Any]], divided: int, clip_norm: float) -> bool:
        """Set the divisors; whether to take the step."""
        squares = [torch.linalg.vector_norm(g, dtype=torch.float32).double().square() for g, _ in gradients(groups)]
        norm = float(torch.stack(squares).sum().sqrt()) / self.of_loss * divided
        for group in groups:
            group["gradient_divisor"] = self.of_loss / divided * max(1.0, norm / clip_norm)
        if np.isfinite(norm):
            self.clean += 1
            self.of_loss *= 2.0 if self.clean % 1000 == 0 else 1.0
            return True
        self.clean = 0
        if self.patience > 1:
            self.patience -= 1
        else:
            self.of_loss = max(1.0, self.of_loss / 2)
        return False


def gradients(groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """All gradients, each with its group."""
    return ((p.grad, group) for group in groups for p in group["params"] if p.grad is not None)


class Overflow:
    """Multiplies the gradient that leaves a block's MLP by 2^60 where `now` is set."""

    def __init__(self, block: nn.Module) -> None:
        self.now = False
        block.contract.register_forward_hook(self._watch)  # type: ignore[union-attr]

    def _watch(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * 2.0**60 if self.now else gradient)


class ProductsInFp32(TorchDispatchMode):
    """Products of 16-bit matrices are computed in fp32 and rounded once."""

    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._overloadpacket in self.products and args[0].dtype in HALF_TYPES.values():  # type: ignore[attr-defined]
            wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
            return func(*wide, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def fresh_net(seed: int) -> Transformer:
    """The same initial weights every time."""
    torch.manual_seed(seed)
    kinds = ("row", "column", "row", "conv")
    return Transformer(**SIZES, width=64, heads=4, kinds=kinds)  # type: ignore[arg-type]


def loss_of(net: Any, text: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy of words (1/8) and codes (7/8), nats."""
    parts = zip(net(text, codes), (text, codes), (1 / 8, 7 / 8), strict=True)
    return sum(w * nn.functional.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y, w in parts)  # type: ignore


def draw(cases: list[dict[str, Any]], by_case: list[list[dict[str, Any]]], file: Path) -> None:
    """A curve for each case: mean over seeds and 50 steps."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for row, runs in zip(cases, by_case, strict=True):
        curve = np.convolve(np.mean([run["curve"] for run in runs], axis=0), np.ones(50) / 50, mode="valid")
        axes.plot(np.arange(len(curve)) + 50, curve, linewidth=1, label=f"{row['name']}: {row['by_fp32']:.4f}")
    axes.set(xlabel="steps", ylabel="loss, nats a token", yscale="log")
    axes.legend(title="loss on held-out images, by that of fp32", fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
