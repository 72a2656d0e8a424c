"""The commands of the golden run, in the words of this commit; paths are relative to the working folder.

`OUTPUTS` of a step are the files and folders whose contents are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

RUNS = "runs/tiny"
DATA, TEXT = f"{RUNS}/shards", f"{RUNS}/text.model"
STEPS = 20
OVERRIDES = (f"steps={STEPS}", "log.every=1", f"log.preview_every={STEPS}", f"log.valid_every={STEPS // 2}")
TOKENIZERS = ("dvae", "vqvae", "vqvae2", "vqgan")
STAGES = (*TOKENIZERS, "vae", "ddpm", "clip")  # without those that train on codes
ZERO = ("dalle", "vqgan")
PAPER_CLUSTER = (
    *("--nodes", "128", "--gpus", "8", "--memory-gib", "16", "--flops", "125e12"),
    *("--intra-gbps", "1200", "--inter-gbps", "100"),
)


class Step(NamedTuple):
    """One program. `ranks`: started through the launcher on so many; 0: a plain Python program."""

    name: str
    program: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    ranks: int = 0


def all_steps(root: Path) -> list[Step]:
    """In the order in which they run. root: of the checkout."""
    return [*data_steps(), *training_steps(root), *zero_steps(root), *sampling_steps(), *evaluation_steps(root)]


def data_steps() -> Iterator[Step]:
    """Data sets from the toy world and from a folder, the text tokenizer, prompts."""
    world = ("--out", DATA, "--train", "96", "--valid", "24", "--prompts", "1")
    yield Step("world", "data_tools/make_toy_world.py", world, (DATA,))
    build = (
        "folder",
        "--out",
        "built",
        "--size",
        "32",
        "--valid-share",
        "0.25",
        "--min-side",
        "16",
        "--dedupe",
        "near",
    )
    yield Step("build", "data_tools/build_shards.py", (*build, "--workers", "2"), ("built",))
    text = ("--data", f"{DATA}/train", "--vocab", "320", "--out", RUNS)
    yield Step("text_tokenizer", "data_tools/train_tokenizer.py", text, (TEXT,))
    pick = ("--data", f"{DATA}/valid", "--limit", "6", "--out", "picked")
    yield Step("pick_prompts", "data_tools/pick_prompts.py", pick, ("picked",))


def training_steps(root: Path) -> Iterator[Step]:
    """Every tiny config at ZeRO 0 on one rank, codes encoded where they are needed."""
    for stage in STAGES:
        yield training(root, stage)
    for tokenizer, codes in (("dvae", "codes"), ("vqvae2", "vqvae2_codes")):
        for split in ("train", "valid"):
            out = f"{RUNS}/{codes}/{split}"
            encode = ("--tokenizer", f"{RUNS}/{tokenizer}/export", "--data", f"{DATA}/{split}", "--out", out)
            yield Step(f"encode_{tokenizer}_{split}", "launch/encode.py", encode, (out,))
    yield training(root, "dalle")
    yield training(root, "vqvae2_prior")
    yield training(root, "vqvae2_prior", f"{RUNS}/vqvae2_prior_top", "model.level=0")


def zero_steps(root: Path) -> Iterator[Step]:
    """The same on two ranks at ZeRO 1 to 3."""
    for stage in ZERO:
        for zero in (1, 2, 3):
            yield training(root, stage, f"runs/zero/{stage}_{zero}", f"engine.zero={zero}", ranks=2)


def training(root: Path, stage: str, run: str = "", *overrides: str, ranks: int = 1) -> Step:
    """A run of a tiny config, in its own folder unless `run` names another."""
    folder = run or f"{RUNS}/{stage}"
    arguments = (str(root / f"configs/tiny/{stage}.yaml"), *OVERRIDES, f"run={folder}", *overrides)
    outputs = tuple(f"{folder}/{name}" for name in ("metrics.jsonl", "previews", "export"))
    return Step(f"train_{Path(folder).name}", "launch/train.py", arguments, outputs, ranks)


def sampling_steps() -> Iterator[Step]:
    """Samples of every stage that can, ranked too."""

    def sample(name: str, *arguments: str, ranks: int = 0) -> Step:
        out = f"samples/{name}"
        return Step(f"sample_{name}", "launch/sample.py", (*arguments, "--out", out), (out,), ranks)

    def model(stage: str) -> tuple[str, str]:
        return "--model", f"{RUNS}/{stage}/export"

    prompts, clip = ("--prompt-file", f"{DATA}/prompts.jsonl", "--candidates", "2"), f"{RUNS}/clip/export"
    yield sample("dalle", *model("dalle"), *prompts, "--clip", clip, "--keep", "1")
    yield sample("dalle_two_ranks", *model("dalle"), *prompts, ranks=2)
    filters = ("temperature=0.9", "top_k=20", "top_p=0.9", "guidance=2", "--seed", "3")
    prime = ("--prime", "samples/dalle/images/00000_0000.png", "--prime-rows", "2")
    yield sample("dalle_filtered", *model("dalle"), *prompts, *filters, *prime)
    yield sample("dalle_wide", *model("dalle"), "--prompts", "a red circle", "size=[8, 12]")
    yield sample("vae", *model("vae"), "--candidates", "4")
    yield sample("ddpm", *model("ddpm"), *prompts)
    yield sample("ddpm_ddim", *model("ddpm"), *prompts, "method=ddim", "steps=8", "eta=0.5", "clip=true")
    yield sample("ddpm_dpm", *model("ddpm"), *prompts, "method=dpm++", "steps=6", "guidance=2")
    yield sample("vqvae2", *model("vqvae2_prior_top"), *model("vqvae2_prior"), *prompts, "--text-tokenizer", TEXT)
    rank = ("--samples", "samples/dalle", "--clip", clip, "--keep-share", "0.5", "--out", "reranked")
    yield Step("rerank", "launch/rerank.py", rank, ("reranked",))
    for stage, options in (("vae", ()), ("ddpm", ("steps=4",))):
        arguments = (*model(stage), "--paths", "2", "--count", "3", *options, "--out", f"between/{stage}")
        yield Step(f"interpolate_{stage}", "launch/interpolate.py", arguments, (f"between/{stage}",))


def evaluation_steps(root: Path) -> Iterator[Step]:
    """Everything that measures exports, samples, or a run that is planned."""
    exports = {stage: f"{RUNS}/{stage}/export" for stage in (*STAGES, "dalle", "vqvae2_prior", "vqvae2_prior_top")}
    valid = ("--data", f"{DATA}/valid")

    def evaluate(name: str, *arguments: str) -> Step:
        out = f"evaluated/{name}"
        return Step(f"evaluate_{name}", "launch/evaluate.py", (*valid, *arguments, "--out", out), (out,))

    yield evaluate("tokenizers", *(exports[name] for name in (*TOKENIZERS, "vae")))
    yield evaluate("ddpm", exports["ddpm"])
    yield evaluate("dalle_prior", exports["dvae"], "--prior", exports["dalle"])
    levels = ("--prior", exports["vqvae2_prior_top"], "--prior", exports["vqvae2_prior"], "--text-tokenizer", TEXT)
    yield evaluate("levels_prior", exports["vqvae2"], *levels)
    clip = ("--clip", exports["clip"], *valid, "--samples", "samples/dalle", "--out", "evaluated/clip")
    yield Step("evaluate_clip", "launch/evaluate_clip.py", clip, ("evaluated/clip",))
    fidelity = (
        "--samples",
        f"{DATA}/train",
        "--reference",
        f"{DATA}/valid",
        "--clip",
        exports["clip"],
        "--subset",
        "8",
    )
    sizes = ("--image-size", "32", "--out", "evaluated/fidelity")
    yield Step("fidelity", "launch/fidelity.py", (*fidelity, *sizes), ("evaluated/fidelity",))
    plan = (str(root / "configs/dalle/paper_12b.yaml"), *PAPER_CLUSTER, "--out", "planned", "engine.zero=3")
    yield Step("plan", "launch/plan.py", plan, ("planned",))
