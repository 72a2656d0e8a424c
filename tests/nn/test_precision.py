"""What `auto` measures, keeps and chooses. What a machine's rates are is no matter of these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle_scale import config, stages
from dalle_scale.nn import precision

TINY = sorted((Path(__file__).parents[2] / "configs" / "tiny").glob("*.yaml"))
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dalle_scale" / "matrix_rates.json"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types that were timed, in turn; bf16 is twice as fast."""
    found: list[torch.dtype] = []

    def rate(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> float:
        found.append(dtype)
        return 1e9 if dtype == torch.float32 else 2e9

    monkeypatch.setattr(precision, "_rate", rate)
    monkeypatch.setattr(precision, "_probe", lambda dtype, device: 1.0)
    return found


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_every_net_can_be_timed(path: Path, file: Path) -> None:
    """The nets lie on "meta" and stay as they are; nobody's random numbers change."""
    run = config.load(path)
    kind = stages.resolve(run.stage)
    with torch.device("meta"):
        nets = kind(config.parse(kind.Config, run.model, "model")).nets()
    before, state = [p.dtype for net in nets.values() for p in net.parameters()], torch.get_rng_state()
    rates = precision.matrix_rates(nets.values(), CPU)
    assert set(rates) == {"fp32", "bf16"} and min(rates.values()) > 0
    assert before == [p.dtype for net in nets.values() for p in net.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    assert precision.choose(nets.values(), CPU).dtype in ("fp32", "bf16")


def test_each_layer_counts_by_its_weights(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_rate", lambda layer, dtype, device: float(layer.out_features))
    monkeypatch.setattr(precision, "_probe", lambda dtype, device: 1.0)
    nets = [nn.Sequential(nn.Linear(9, 4), nn.Linear(9, 4)), nn.Linear(19, 8)]
    assert precision.matrix_rates(nets, CPU)["fp32"] == pytest.approx((80 + 160) / (80 / 4 + 160 / 8))


def test_kept_for_the_machine(file: Path, timed: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 2, 3))
    first = precision.matrix_rates([net], CPU)
    assert timed == 2 * [torch.float32] + 2 * [torch.bfloat16] and first == pytest.approx({"fp32": 1e9, "bf16": 2e9})
    assert precision.matrix_rates([net], CPU) == first and len(timed) == 4
    other: list[Callable[[], object]] = [
        lambda: precision.matrix_rates([nn.Linear(3, 5)], CPU),
        lambda: precision.matrix_rates([nn.Conv2d(2, 2, 3, stride=2)], CPU),
    ]
    for measure in other:
        before = len(timed)
        measure()
        assert len(timed) == before + 2
    monkeypatch.setattr(precision, "processor", lambda: ("another", ["flag"]))
    precision.matrix_rates([net], CPU)
    assert len(timed) == 12 and len(json.loads(file.read_text())) == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        precision.matrix_rates([net], CPU)
    finally:
        torch.set_num_threads(threads)
    assert len(timed) == 16


def test_an_emulated_type_is_not_timed(file: Path, timed: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers would take seconds."""
    monkeypatch.setattr(precision, "_probe", lambda dtype, device: 1.0 if dtype == torch.float32 else 100.0)
    assert precision.matrix_rates([nn.Linear(3, 4)], CPU) == pytest.approx({"fp32": 1e9, "bf16": 1e7})
    assert timed == [torch.float32] and precision.choose([nn.Linear(3, 4)], CPU).dtype == "fp32"


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", '{"KEY": 3}', '{"KEY": {"fp32": 1}}', '{"KEY": {"fp32": 0, "bf16": "x"}}']
)
def test_a_damaged_file_is_measured_again(file: Path, timed: list[torch.dtype], damage: str) -> None:
    net = nn.Linear(3, 4)
    rates = precision.matrix_rates([net], CPU)
    [key] = json.loads(file.read_text())
    file.write_text(damage.replace('"KEY"', json.dumps(key)))
    assert precision.matrix_rates([net], CPU) == rates and len(timed) == 4
    assert precision.matrix_rates([net], CPU) == rates and len(timed) == 4
    file.write_bytes(b"\xff\x00")
    assert precision.matrix_rates([net], CPU) == rates and len(timed) == 6


def test_without_a_place_to_keep_it(tmp_path: Path, timed: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert precision.matrix_rates([nn.Linear(3, 4)], CPU) == pytest.approx({"fp32": 1e9, "bf16": 2e9})


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen", "why"),
    [
        (100e9, 150e9, "bf16", "150 GFLOP/s, fp32 100 (1.50 x)"),
        (100e9, 149e9, "fp32", "bf16 has 149 GFLOP/s, fp32 100 (1.49 x)"),
        (120e9, 0.9e9, "fp32", "bf16 has 1 GFLOP/s, fp32 120 (0.01 x)"),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float, chosen: str, why: str) -> None:
    monkeypatch.setattr(precision, "matrix_rates", lambda nets, device: {"fp32": fp32, "bf16": bf16})
    assert precision.choose([], CPU) == precision.agreed([], CPU) == precision.Choice(chosen, why)


def test_nothing_to_time(file: Path) -> None:
    assert precision.choose([nn.LayerNorm(3)], CPU).dtype == "fp32"


def test_a_processor_has_a_name() -> None:
    name, flags = precision.processor()
    assert name and flags == sorted(flags)
