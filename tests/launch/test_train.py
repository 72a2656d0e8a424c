"""launch/train.py through the real launcher: ZeRO 0 to 3 and 1 and 2 processes agree, resume is exact, signals save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file
from support.processes import HANG_SECONDS, ROOT, TESTS, command, environment, short_command
from support.runs import metrics, toy_run, write_config, write_images

from dalle_scale.checkpoint import export, resume
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data import codes

PROGRAM = ROOT / "launch" / "train.py"
STAGES = ("dvae", "dalle", "clip", "vae", "vqvae", "vqvae2", "vqvae2_prior", "ddpm")
# Fresh features of the tiny vqvae2 are all but equal, and which of two codes is nearer is up to their last bits
COMPARED = tuple(stage for stage in STAGES if stage != "vqvae2")
ZEROS = (0, 1, 2, 3)
RESHARDED = [(stage, 0) for stage in COMPARED] + [(stage, zero) for stage in ("dvae", "dalle") for zero in ZEROS[1:]]
STEPS = 6
# Sums run in another order at every ZeRO stage and world size; six steps of these models carry that to 1e-6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of short runs of the shipped tiny models over data sets made here."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 30), ("valid", 13)):
        write_images(folder / "shards" / split, count, size=32, seed=count)
        write_codes(folder / "codes" / split, count, 64, [8])
        write_codes(folder / "vqvae2_codes" / split, count, 32, [4, 8])
    sentences = iter([f"image number {index} of a thing" for index in range(100)])
    with (folder / "text.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=file, model_type="bpe", vocab_size=320, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, bos_id=-1, eos_id=-1, normalization_rule_name="nmt_nfkc_cf",
        )  # fmt: skip
    configs = {}
    for stage in STAGES:
        text = (ROOT / "configs" / "tiny" / f"{stage}.yaml").read_text().replace("runs/tiny/", f"{folder}/")
        tree = yaml.safe_load(text)
        tree.pop("tokenizer", None)
        tree["steps"] = STEPS
        if stage == "vqvae":  # k-means puts codes so near to each other that rounding says which is the nearest
            tree["model"]["quantizer"] |= {"init": "random", "restart_below": 0.0}
        # Where a gradient is zero in theory (bias of attention keys), Adam with a small eps would walk on its rounding
        tree["optim"]["model"] |= {"ema_decay": 0.8, "eps": 1e-5}
        tree["log"] = {"every": 1, "preview_every": 6, "valid_every": 3, "valid_samples": 13, "save_every": 3}
        configs[stage] = write_config(folder / f"{stage}.yaml", tree)
    return configs


def write_codes(folder: Path, count: int, vocab: int, grids: list[int]) -> None:
    info = {"kind": "codes", "vocab": vocab, "grids": grids}
    with ShardWriter(folder, samples_per_shard=20, info=info) as writer:
        for index in range(count):
            sampled = np.random.default_rng(index).integers(0, vocab, sum(grid**2 for grid in grids))
            writer.add(f"{index:05d}", {"codes": codes.pack(sampled), "txt": f"image number {index}".encode()})


def run_many(runs: list[list[Any]], folder: Path, processes: int) -> None:
    """Train all of `runs` (argument lists) in one launch."""
    todo = folder / f"runs_{processes}.json"
    todo.write_text(json.dumps([[str(argument) for argument in run] for run in runs]))
    line = short_command(TESTS / "support" / "many_runs.py", str(todo), processes=processes)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `<stage>_zero<n>_<processes>`; `..._resumed`, which continued from the third step of the run with two;
    `grown`, which continued from that of a run with one at another stage;
    `in_step_<processes>`, a transformer over images that a dVAE encodes in the step; and `latents_<processes>`,
    diffusion of what a VAE makes of images."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (2, 1):
        todo: list[list[Any]] = []
        for stage, config in tiny.items():
            for zero in ZEROS:
                third = folder / f"{stage}_zero{zero}_2" / "checkpoints" / "00000003"
                name = f"{stage}_zero{zero}_{processes}"
                arguments = [config, f"engine.zero={zero}"]
                todo.append([*arguments, f"run={folder / name}"])
                if processes == 2 or (stage, zero) in RESHARDED:
                    todo.append([*arguments, f"run={folder / name}_resumed", "--resume", third])
        tokenizer = folder / "dvae_zero0_2" / "export"
        todo += [
            [config, "engine.dtype=bf16", f"run={folder}/{stage}_bf16_{processes}"] for stage, config in tiny.items()
        ]
        in_step = [tiny["dalle"], f"tokenizer={tokenizer}", "model.encode_in_step=true", "engine.zero=3"]
        data = {split: f"data.{split}={tiny['dvae'].parent}/shards/{split}" for split in ("train", "valid")}
        todo.append([*in_step, *data.values(), f"run={folder}/in_step_{processes}"])
        shape = ["image_size=32", "latent_channels=8", "latent_size=1", "multipliers=[1]", "attention_sizes=[]"]
        below = [f"tokenizer={folder / 'vae_zero0_2' / 'export'}", *(f"model.{part}" for part in shape)]
        todo.append([tiny["ddpm"], *below, "engine.zero=3", f"run={folder}/latents_{processes}"])
        run_many(todo, folder, processes)
    third = folder / "dvae_zero1_1" / "checkpoints" / "00000003"
    run_many([[tiny["dvae"], "engine.zero=3", f"run={folder}/grown", "--resume", third]], folder, processes=2)
    return folder


@pytest.mark.parametrize("stage", COMPARED)
def test_same_losses_everywhere(runs: Path, stage: str) -> None:
    want = metrics(runs / f"{stage}_zero0_1")
    assert sum("train/loss" in line for line in want) == STEPS and sum("valid/loss" in line for line in want) == 2
    for zero in ZEROS:
        for processes in (1, 2):
            got = metrics(runs / f"{stage}_zero{zero}_{processes}")
            assert len(got) == len(want)
            for line, reference in zip(got, want, strict=True):
                assert line == pytest.approx(reference, rel=TOLERANCE), (zero, processes)


@pytest.mark.parametrize("stage", COMPARED)
def test_same_export_everywhere(runs: Path, stage: str) -> None:
    """Exports hold the weight average, so this also compares the averages of all ZeRO stages."""
    want = load_file(runs / f"{stage}_zero0_1" / "export" / "model.safetensors")
    for zero in ZEROS:
        for processes in (1, 2):
            opened = export.load(runs / f"{stage}_zero{zero}_{processes}" / "export")
            assert opened.trained["step"] == STEPS and opened.trained["weights"]["model"] == "ema 0.8"
            for name, tensor in opened.nets["model"].state_dict().items():
                torch.testing.assert_close(tensor, want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", COMPARED)
def test_bf16_trains_anywhere(runs: Path, stage: str, processes: int) -> None:
    """Near fp32 on processors without products of bf16 too; weights are rounded to 8 bits, some losses are sums."""
    for line, reference in zip(
        metrics(runs / f"{stage}_bf16_{processes}"), metrics(runs / f"{stage}_zero0_1"), strict=True
    ):
        for name in (name for name in reference if name.endswith("/loss")):
            assert line[name] == pytest.approx(reference[name], rel=0.1, abs=0.05), (name, line["step"])


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_exact(runs: Path, stage: str, zero: int) -> None:
    whole, resumed = runs / f"{stage}_zero{zero}_2", runs / f"{stage}_zero{zero}_2_resumed"
    windows = ("train/codes_used", "train/perplexity", "train/psnr_db")  # of the last samples; start empty on resume
    later = [line for line in metrics(whole) if line["step"] > 3]
    for line, reference in zip(metrics(resumed), later, strict=True):
        assert {k: v for k, v in line.items() if not k.startswith(windows)} == {
            k: v for k, v in reference.items() if not k.startswith(windows)
        }
    want = load_file(whole / "export" / "model.safetensors")
    got = load_file(resumed / "export" / "model.safetensors")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("name", "stage"), [(f"{stage}_zero{zero}_1_resumed", stage) for stage, zero in RESHARDED] + [("grown", "dvae")]
)
def test_resume_at_another_world_size(runs: Path, name: str, stage: str) -> None:
    """One process continues where two stopped, and two, at another ZeRO stage, where one did."""
    want = [line for line in metrics(runs / f"{stage}_zero0_1") if line["step"] > 3]
    for line, reference in zip(metrics(runs / name), want, strict=True):
        losses = {name: value for name, value in reference.items() if name.endswith("/loss")}
        assert losses and {name: line[name] for name in losses} == pytest.approx(losses, rel=TOLERANCE)


def test_tokenizer_in_the_step(runs: Path) -> None:
    """Losses agree, ZeRO 3 can sample a preview, and the export brings its image and text tokenizer along."""
    for line, reference in zip(metrics(runs / "in_step_1"), metrics(runs / "in_step_2"), strict=True):
        assert line == pytest.approx(reference, rel=TOLERANCE)
    assert (runs / "in_step_2" / "previews" / "samples_0000006.png").is_file()
    opened = export.load(runs / "in_step_2" / "export")
    assert opened.stage.upstream is not None and opened.stage.upstream.vocab == 64
    text = opened.part("text_tokenizer")
    assert text is not None and text.suffix == ".model"


def test_diffusion_of_latents(runs: Path) -> None:
    """Losses agree, and the scale that rank 0 has measured is that of all ranks and of the export."""
    for line, reference in zip(metrics(runs / "latents_1"), metrics(runs / "latents_2"), strict=True):
        assert line == pytest.approx(reference, rel=TOLERANCE)
    scales = [export.load(runs / f"latents_{n}" / "export").nets["model"].latent_scale for n in (1, 2)]
    assert torch.equal(*scales) and scales[0].isfinite()
    assert (runs / "latents_2" / "previews" / "samples_0000006.png").is_file()


def test_a_run_leaves_what_it_should(runs: Path) -> None:
    folder = runs / "dvae_zero3_2"
    assert [checkpoint.step for checkpoint in resume.committed(folder)] == [3, 6]
    assert (folder / "config.yaml").is_file() and "engine.zero=3" in (folder / "log").read_text()
    assert (folder / "previews" / "reconstruction_0000006.png").is_file()
    assert not list(folder.rglob("*.tmp"))


def start(config: Path, *overrides: str, processes: int) -> subprocess.Popen[str]:
    line = command(PROGRAM, str(config), *overrides, processes=processes)
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], timeout_seconds: float = HANG_SECONDS
) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the trainers below a launcher."""
    import psutil

    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child.pid for child in children if any("--local_rank" in word for word in child.cmdline())]


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_signal_saves_and_the_same_command_goes_on(toy_data: dict[str, str], tmp_path: Path) -> None:
    """SIGTERM to one rank, then SIGKILL while it writes checkpoints: the losses are those of an undisturbed run."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, run, steps=1_000_000))
    process = start(config, processes=2)
    wait_for(lambda: lines(run) >= 5, process)
    os.kill(ranks_of(process)[-1], signal.SIGTERM)
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 0, output[-3000:]
    (checkpoint,) = resume.committed(run)
    assert f"stopped and saved after {checkpoint.step} steps" in output
    assert metrics(run)[-1]["step"] == checkpoint.step and (run / "export").is_dir()

    process = start(config, "log.save_every=1", processes=2)
    wait_for(lambda: lines(run) >= checkpoint.step + 3, process)
    os.kill(ranks_of(process)[0], signal.SIGKILL)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0

    last = resume.committed(run)[-1].step
    assert last > checkpoint.step
    end = f"steps={last + 3}"
    run_many([[config, end], [config, end], [config, end, f"run={tmp_path / 'whole'}"]], tmp_path, processes=2)
    want = {line["step"]: line for line in metrics(tmp_path / "whole")}
    for line in metrics(run):
        assert line == want[line["step"]]
    assert metrics(run)[-1]["step"] == last + 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch_size=7", "global_batch_size: 7 does not divide by the world size 2"),
        ("model.nan_at=2", "update 3: not finite: loss"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    toy_data: dict[str, str], tmp_path: Path, override: str, message: str
) -> None:
    config = write_config(tmp_path / "c.yaml", toy_run(toy_data, tmp_path / "run"))
    process = start(config, override, processes=2)
    output = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 2, output
    told = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and message in told[0]
    assert "Traceback" not in output
    assert not resume.committed(tmp_path / "run")
