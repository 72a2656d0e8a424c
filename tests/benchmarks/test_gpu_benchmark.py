"""benchmarks/gpu.py at toy size on the CPU: every measurement runs, and its numbers belong together.

Not covered: anything that only a GPU does (its clock, its memory, its kernels).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import HANG_SECONDS, ROOT, environment

PROGRAM = ROOT / "benchmarks" / "gpu.py"
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("bf16, fp32 masters and states", "bf16, 16-bit states", "fp16, 16-bit states, a scale a branch")


@pytest.fixture(scope="module")
def modules() -> Any:
    """Those of the folder that need no device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu_autoencoders
        import gpu_engine
        import gpu_sides
        import gpu_states
        import gpu_step
        import gpu_tokens
        import gpu_training

        found = (gpu_autoencoders, gpu_engine, gpu_sides, gpu_states, gpu_step, gpu_tokens, gpu_training)
        yield SimpleNamespace(**{module.__name__.removeprefix("gpu_"): module for module in found})


def run(*options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(PROGRAM), *map(str, options)]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)


def measured(name: str, out: Path, *options: object) -> dict[str, Any]:
    done = run(name, "--toy", "--device=cpu", "--no-install", f"--out={out}", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert result["command"].startswith(f"python benchmarks/gpu.py {name} --toy")
    assert {"hardware", "versions", "commit", "date"} <= result.keys() and result["matrix_rate"] > 1e8
    return result


def visible_pairs() -> int:
    """Queries and keys of a row, a column and a conv layer (5 x 5) over 22 states and 8 x 8 codes, one by one."""
    found = 0
    for query in range(22 + 64):
        for key in range(query + 1):
            back = query - key
            near = (back <= 8, back % 8 == 0, back in {8 * up + aside for up in range(3) for aside in range(-2, 3)})
            found += 3 if key < 22 else sum(near)
    return found


def test_step_holds_what_the_plan_says(tmp_path: Path) -> None:
    """Two micro-batches of two samples of 20 tokens and 64 codes a step; three layers of width 32."""
    result = measured("step", tmp_path / "step.json")
    memory, model_tokens = result["memory"], 2 * 2 * (20 + 64)
    assert memory["measured_lasting_bytes"] == pytest.approx(memory["lasting_bytes"], rel=0.05)
    assert result["tokens_per_second"] * result["seconds"] == pytest.approx(model_tokens, rel=0.01)
    share = result["flops_that_the_masks_need"] / result["seconds"] / result["matrix_rate"]
    assert result["share_of_matrix_rate"] == pytest.approx(share, abs=2e-5)
    again = result["share_of_matrix_rate_with_recomputation"]
    assert again == pytest.approx(share * 4 / 3, abs=2e-5)
    products = 3 * 12 * 32**2 * (22 + 64) + 32 * (20 * 340 + 64 * 64) + 2 * 32 * visible_pairs()  # of one sample
    assert result["flops_that_the_masks_need"] == 4 * 6 * products
    uniform = math.log(320 + 20) / 8 + math.log(64) * 7 / 8
    assert 0.8 * uniform < result["loss_nats"] < uniform  # the same batch six times


def test_states_are_compared_on_the_same_batches(tmp_path: Path) -> None:
    result = measured("states", tmp_path / "states.json", "--steps=30")
    assert tuple(result["cases"]) == KINDS
    reference = result["cases"][KINDS[0]]
    for row in result["cases"].values():
        assert row["training_nats"][0] == pytest.approx(reference["training_nats"][0], rel=2e-3)
        assert result["least_possible_nats"] < row["held_out_nats"] < row["training_nats"][0] - 0.001
        assert row["by_fp32_states"] == pytest.approx(row["held_out_nats"] / reference["held_out_nats"], abs=1e-5)
        assert row["by_fp32_states"] == pytest.approx(1, abs=2e-3)
    assert result["cases"][KINDS[2]]["log"]["log2_scale_min"] > 0
    with Image.open(tmp_path / "states.png") as image:
        assert np.unique(np.asarray(image.convert("L"))).size > 10


def test_training_beside_peers(tmp_path: Path) -> None:
    """A peer that is not there has a row that says so."""
    result = measured("training", tmp_path / "training.json")
    assert result["alone"]["parameters"] == 65_248 and result["alone"]["share_of_matrix_rate"] > 0
    sides = result["beside_peers"]["sides"]
    assert list(sides) == ["ours", "DALLE-pytorch", "DALLE-pytorch, full attention", "GPT-2"]
    for name in ("ours", "GPT-2"):
        assert sides[name]["tokens_per_second"] * sides[name]["seconds"] == pytest.approx(2 * (8 + 64), rel=0.01)
    lowest, middle = (sides["GPT-2"][key] for key in ("ours_times_as_fast_lowest", "ours_times_as_fast"))
    assert 0 < lowest <= middle
    for name in ("DALLE-pytorch", "DALLE-pytorch, full attention"):
        assert "seconds" in sides[name] or "not installed" in sides[name]["not_measured"]


@pytest.mark.parametrize(("options", "at_a_time"), [((), 7), (("--samples=3",), 3)])
def test_sampling_draws_all_candidates_and_writes_nothing_by_itself(options: tuple[str, ...], at_a_time: int) -> None:
    before = set(RESULTS.iterdir())
    done = run("sampling", "--toy", "--device=cpu", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert (result["candidates"], result["different_candidates"], result["drawn_at_a_time"]) == (7, 7, at_a_time)
    assert result["seconds"] == pytest.approx(result["seconds_drawing"] + result["seconds_decoding"], abs=0.002)
    # keys and values of width 32 and 2 bytes: a row and a state more; the whole image; 2 rows, and a window of 13
    slots = (8 + 1) + 64 + (2 * 8 + 2 * 5 + 3)
    assert result["memory_a_candidate"]["cache_bytes"] == slots * 2 * 32 * 2
    assert set(RESULTS.iterdir()) == before


def test_autoencoders_beside_peers(tmp_path: Path) -> None:
    result = measured("autoencoders", tmp_path / "autoencoders.json")
    dvae, diffusion = result["dvae"]["sides"], result["diffusion"]["sides"]
    assert dvae["ours"]["images_per_second"] > 0 and dvae["paper's stem"]["ours_times_as_fast"] > 0
    assert "seconds" in dvae["dalle-pytorch"] or "not installed" in dvae["dalle-pytorch"]["not_measured"]
    assert diffusion["ours"]["parameters"] == diffusion["diffusers"]["parameters"]
    assert diffusion["diffusers"]["ours_times_as_fast"] > 0


def test_a_side_that_fails_says_why_and_the_others_go_on(modules: Any) -> None:
    shape = {"kind": "transformer", "side": "ours", "samples": 2, "attention": ["full"]}
    asked = {
        "ours": {**shape, "sizes": modules.training.SMALL},
        "odd": {**shape, "sizes": {**modules.training.SMALL, "HEADS": 3}},
    }
    rows = modules.sides.compare(asked, 2, "samples", 1, False, torch.device("cpu"))
    assert rows["ours"]["seconds"] > 0
    assert rows["odd"].keys() == {"not_measured"} and "does not divide by model.heads 3" in rows["odd"]["not_measured"]


def test_a_closed_engine_leaves_no_memory() -> None:
    """Or the next one of the same measurement would not fit."""
    lines = """
        import torch, gpu_clock, gpu_engine
        from static_bytes import live_bytes
        device = gpu_clock.open_device("cpu")
        for kind in ("adamw", "adamw16", "adamw"):
            kinds = (f"optim.model.kind={kind}", "engine.dtype=bf16", "model.width=64")
            run = gpu_engine.Run.open(gpu_engine.load("tiny/dalle", 2, 1, *kinds))
            run.update(gpu_engine.random_batches(run, device))
            held = live_bytes()
            run.close()
            del run
            gpu_clock.release(device)
            assert live_bytes() < held / 20, (kind, held, live_bytes())
    """
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n" + textwrap.dedent(lines)
    subprocess.run([sys.executable, "-c", script], env=environment(), check=True, capture_output=True)


def test_the_rule_that_draws_tokens(modules: Any) -> None:
    rule = modules.tokens.Rule(text_vocab=320, text_length=20, image_vocab=64, grid=8)
    text, codes = rule.draw(4000, torch.Generator().manual_seed(0))
    assert rule.words == 16 and torch.equal(text[:, 16:], torch.arange(336, 340).expand(4000, -1))
    kept = 0
    painted = torch.empty_like(codes)
    for place in range(64):
        row, column = divmod(place, 8)
        word = text[:, 4 * (row // 2) + column // 2]
        painted[:, place] = 4 * word + 2 * (row % 2) + column % 2
        kept += int((codes[:, place] == painted[:, place]).sum())
    assert kept / codes.numel() == pytest.approx(0.9 + 0.1 / 64, abs=0.01)
    # what a model that knows the rule loses on these very tokens
    right = (codes == painted).double()
    nats = -(right * math.log(0.9 + 0.1 / 64) + (1 - right) * math.log(0.1 / 64)).mean().item()
    best = math.log(16) * 16 / 20 / 8 + nats * 7 / 8
    assert rule.least_nats(1 / 8) == pytest.approx(best, rel=0.015)


def test_the_full_sizes_are_ones_that_the_program_takes(modules: Any) -> None:
    """The 12-billion-parameter model in one GPU of 141 GB, by the plan; every config loads."""
    sizes = modules.step.FULL
    config = modules.engine.load(sizes.config, sizes.samples, sizes.accumulation, *modules.step.CHANGES)
    plan = modules.engine.planned(config, 139.0, 790e12)
    assert 12.0e9 < plan["parameters"] < 12.5e9
    assert plan["lasting_bytes"] / plan["parameters"] == pytest.approx(8, abs=0.2)
    assert plan["peak_bytes"] < 0.9 * 139 * 2**30
    for changes in modules.states.CASES.values():
        states = modules.states.FULL
        assert modules.states.rule_of(modules.engine.load(states.config, states.samples, 1, *changes)).words == 64
    from dalle_scale.stages import dvae

    asked = modules.autoencoders.dvaes(modules.autoencoders.FULL)
    assert "ours, dvae/paper_256" in asked
    for side in asked.values():
        if side["side"] == "ours":
            shape = {"image_size": side["shape"]["image_size"], "vocab": side["shape"]["vocab"]}
            dvae.Stage.Config.model_validate_json(json.dumps({**side["model"], **shape}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("step", "--device=cpu"), "--device: cpu takes days for models of this size; add --toy"),
        (("step", "--toy", "--device=cpu", "--steps=3"), "--steps: not of 'step'"),
        (("states", "--toy", "--device=cpu", "--steps=0"), "--steps: 0 is below 1"),
        (("sampling", "--toy", "--device=cpu", "--out=nowhere/x.json"), "--out: nowhere is no folder"),
        (("step",), "--device: cuda, but PyTorch finds no GPU here"),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], message: str) -> None:
    if options == ("step",) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(*options)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and message in line


def test_all_measurements_of_the_help_are_there(modules: Any) -> None:
    import gpu

    assert isinstance(gpu, ModuleType)
    for name in gpu.MEASUREMENTS:
        assert (ROOT / "benchmarks" / f"gpu_{name}.py").is_file() and f"gpu.py {name} " in (gpu.__doc__ or "")
