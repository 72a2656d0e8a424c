"""Two nodes of two ranks against one of four: the same losses and weights; resuming, and wrong numbers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.processes import HANG_SECONDS, ROOT, TESTS, environment, short_command
from support.runs import write_config, write_images

from dalle_scale.checkpoint import export

ZEROS = (1, 2, 3)
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `one_<zero>` (four ranks), `two_<zero>` (2 x 2), `low_<zero>` (2 x 2, compressed), and `..._resumed` of the
    last two, on from the third step."""
    folder = tmp_path_factory.mktemp("nodes")
    for split, count in (("train", 40), ("valid", 13)):
        write_images(folder / "shards" / split, count, size=32, seed=count)
    text = (ROOT / "configs" / "tiny" / "dvae.yaml").read_text().replace("runs/tiny/", f"{folder}/")
    tree = yaml.safe_load(text) | {"steps": STEPS, "global_batch_size": 8}
    tree["optim"]["model"] |= {"ema_decay": 0.8, "eps": 1e-5, "clip_norm": 0.3}
    tree["log"] = {"every": 1, "valid_every": 3, "valid_samples": 13, "save_every": 3}
    config = write_config(folder / "dvae.yaml", tree)
    todo: list[list[Any]] = [[config, f"run={folder}/one_{zero}", f"engine.zero={zero}"] for zero in ZEROS]
    for zero in ZEROS:  # after the others: DeepSpeed remembers the nodes
        two = [config, "engine.nodes=2", "engine.micro_batch_size=1", f"engine.zero={zero}"]
        for name, rank in (("two", 0), ("low", 2)):
            run = [*two, f"engine.compression_rank={rank}"]
            third = folder / f"{name}_{zero}" / "checkpoints" / "00000003"
            todo.append([*run, f"run={folder}/{name}_{zero}"])
            todo.append([*run, f"run={folder}/{name}_{zero}_resumed", "--resume", third])
    (folder / "runs.json").write_text(json.dumps([[str(argument) for argument in run] for run in todo]))
    launch(folder / "runs.json", processes=4)
    return folder


def launch(todo: Path, processes: int) -> None:
    line = short_command(TESTS / "support" / "many_runs.py", str(todo), processes=processes)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The averaged ones, which are exported."""
    return load_file(run / "export" / "model.safetensors")


@pytest.mark.parametrize("zero", ZEROS)
def test_two_nodes_are_one(runs: Path, zero: int) -> None:
    want, got = metrics(runs / f"one_{zero}"), metrics(runs / f"two_{zero}")
    assert len(want) == STEPS + 2 and len(got) == len(want)
    for line, reference in zip(got, want, strict=True):
        losses = {key: value for key, value in reference.items() if "/" in key}
        assert {key: line[key] for key in losses} == pytest.approx(losses, rel=1e-5)
    expected = weights(runs / "one_1")
    for name, tensor in weights(runs / f"two_{zero}").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", ZEROS)
def test_compression_follows_closely(runs: Path, zero: int) -> None:
    """Not the same numbers, or nothing would have been compressed; the loss all the same."""
    want, got = metrics(runs / f"two_{zero}"), metrics(runs / f"low_{zero}")
    losses = [
        (row["train/loss"], line["train/loss"]) for row, line in zip(want, got, strict=True) if "train/loss" in row
    ]
    assert losses[-1][0] != losses[-1][1] and losses[-1][1] == pytest.approx(losses[-1][0], rel=0.02)
    errors = sorted((runs / f"low_{zero}" / "checkpoints" / "00000006" / "model").glob("compression_errors_*"))
    assert [path.name[-17:-12] for path in errors] == ["00000", "00001"]
    assert all(any(error.any() for error in load_file(path).values()) for path in errors)


@pytest.mark.parametrize("kind", ["two", "low"])
@pytest.mark.parametrize("zero", ZEROS)
def test_resume_is_bit_exact(runs: Path, zero: int, kind: str) -> None:
    whole, resumed = runs / f"{kind}_{zero}", runs / f"{kind}_{zero}_resumed"
    later = [row for row in metrics(whole) if row["step"] > 3]
    windows = ("train/codes_used", "train/perplexity", "train/psnr_db")  # of the last samples; start empty on resume
    for line, reference in zip(metrics(resumed), later, strict=True):
        losses = {key: value for key, value in reference.items() if "/" in key and key not in windows}
        assert {key: line[key] for key in losses} == losses
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_other_numbers_of_machines_go_on(runs: Path) -> None:
    """From two nodes of one rank to one and to four: what compression left behind comes along."""
    for nodes in (2, 1, 4):
        run = runs / f"machines_{nodes}"
        options = [f"run={run}", "engine.zero=1", f"engine.nodes={nodes}", "engine.compression_rank=2"]
        if nodes != 2:
            options += ["--resume", str(runs / "machines_2" / "checkpoints" / "00000003")]
        (runs / "todo.json").write_text(json.dumps([[str(runs / "dvae.yaml"), *options]]))
        launch(runs / "todo.json", processes=nodes)
    want = [row for row in metrics(runs / "machines_2") if row["step"] > 3]
    for nodes in (1, 4):
        for line, reference in zip(metrics(runs / f"machines_{nodes}"), want, strict=True):
            losses = {key: value for key, value in reference.items() if key.endswith("loss")}
            assert {key: line[key] for key in losses} == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("two", 0), ("low", 2)])
def test_bytes_between_machines(runs: Path, kind: str, rank: int) -> None:
    """Half of each parameter, or the factors of half its rows, where these are smaller."""
    numbers = 0
    for parameter in export.load(runs / f"{kind}_3" / "export").nets["model"].parameters():
        rows, columns = len(parameter) // 2, parameter[0].numel()
        factors = rank * (rows + columns)
        matrix = parameter.ndim > 1 and not getattr(parameter, "is_embedding", False) and len(parameter) % 2 == 0
        numbers += factors if rank and matrix and factors < rows * columns else -(-parameter.numel() // 2)
    [sent] = [row["between_nodes_mib"] for row in metrics(runs / f"{kind}_3")[:3] if row["step"] == 3]
    assert sent == pytest.approx(3 * 4 * numbers / 2**20)  # at the first save errors are averaged as well
