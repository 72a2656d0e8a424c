"""The derived DeepSpeed configuration, key by key, and what the engine refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dalle_scale.config import RunConfig, parse
from dalle_scale.engine import ds_config
from dalle_scale.types import UserError


def make(engine: dict[str, Any] | None = None, **optim: Any) -> RunConfig:
    tree = {"stage": "x", "run": "x", "steps": 1, "global_batch_size": 8, "data": {"train": "x"}}
    return parse(
        RunConfig,
        {**tree, "engine": {"dtype": "fp32", **(engine or {})}, "optim": {"model": {"lr": 0.1, **optim}}},
        "test",
    )


def test_golden() -> None:
    """No default of the library trains the model: a key that appears or changes must appear or change here."""
    assert ds_config.derive(make({"micro_batch_size": 2}), "model", world_size=2) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 0,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": False,
            "reduce_bucket_size": 16777216,
            "allgather_partitions": True,
            "allgather_bucket_size": 16777216,
            "round_robin_gradients": False,
            "ignore_unused_parameters": True,
            "elastic_checkpoint": False,
            "load_from_fp32_weights": True,
            "compute_grad_norm": True,
        },
        "bf16": {"enabled": False, "immediate_grad_update": True, "check_grad_overflow": True},
        "fp16": {
            "enabled": False,
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "torch_autocast": {"enabled": False},
        "checkpoint": {"tag_validation": "Ignore"},
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def test_what_depends_on_the_config() -> None:
    derived = ds_config.derive(make({"zero": 2, "dtype": "bf16"}, clip_norm=4.0), "model", world_size=1)
    assert derived["gradient_clipping"] == 4.0 and derived["bf16"]["enabled"]
    assert derived["communication_data_type"] == "bf16" and derived["zero_optimization"]["compute_grad_norm"]
    assert not ds_config.derive(make({"zero": 1}), "model", 1)["zero_optimization"]["compute_grad_norm"]
    zero3 = ds_config.derive(make({"zero": 3}), "model", 1)["zero_optimization"]
    assert zero3["stage3_param_persistence_threshold"] == 10_000 and zero3["compute_grad_norm"]


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        (make({"dtype": "fp16", "zero": 1}), CPU, "engine.dtype: fp16 needs a GPU"),
        (make({"dtype": "fp16"}), GPU, r"fp16 needs engine\.zero=1, 2 or 3"),
        (make({"zero": 1}, kind="muon"), CPU, r"optim\.model\.kind: muon needs whole matrices, ZeRO 1 cuts them"),
        (make({"micro_batch_size": 3}), CPU, "micro-batch 3 x world size 2"),
    ],
)
def test_refused(config: RunConfig, device: torch.device, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ds_config.check(config, world_size=2, device=device)


@pytest.mark.parametrize("engine", [{"dtype": "bf16"}, {"zero": 3}, {"zero": 2, "dtype": "bf16"}])
def test_accepted(engine: dict[str, Any]) -> None:
    ds_config.check(make(engine), world_size=2, device=CPU)
    ds_config.check(make({"dtype": "fp16", "zero": 1}), world_size=2, device=GPU)
    ds_config.check(make({"dtype": "bf16"}, kind="muon"), world_size=2, device=CPU)


def test_one_optim_entry_a_net() -> None:
    ds_config.check_nets(make(), {"model": torch.nn.Identity()})
    with pytest.raises(UserError, match="optim: has entries for model, stage 'x' trains model, critic"):
        ds_config.check_nets(make(), {"model": torch.nn.Identity(), "critic": torch.nn.Identity()})


def test_several_machines() -> None:
    """DeepSpeed sees one of them."""
    engine = {"nodes": 2, "zero": 3, "micro_batch_size": 1}
    derived = ds_config.derive(make(engine), "model", world_size=4)
    batch = [derived[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu")]
    assert [*batch, derived["gradient_accumulation_steps"]] == [4, 1, 2]
    cpu = torch.device("cpu")
    ds_config.check(make(engine), 4, cpu)
    for changes, message in (
        ({"nodes": 3}, "engine.nodes: 3, but 4 processes do not divide among them"),
        ({"zero": 0}, "need engine.zero=1, 2 or 3 inside a node"),
        ({"zero": 0, "nodes": 1, "compression_rank": 4}, "need engine.zero=1, 2 or 3 inside a node"),
        ({"dtype": "fp16", "compression_rank": 4}, "goes with engine.dtype=fp16 only where optim kind is adamw16"),
    ):
        with pytest.raises(UserError, match=message):
            ds_config.check(make({**engine, **changes}), 4, None if "dtype" in changes else cpu)


def test_16_bit_states() -> None:
    """DeepSpeed is told of fp32 and has nothing to scale or clip."""
    for zero, accumulated in ((1, "fp16"), (2, "fp16"), (3, "fp32")):
        short = make({"zero": zero, "dtype": "fp16"}, kind="adamw16", clip_norm=4.0)
        ds_config.check(short, 2, CPU)
        derived = ds_config.derive(short, "model", world_size=2)
        assert not derived["bf16"]["enabled"] and not derived["fp16"]["enabled"]
        assert derived["fp16"]["loss_scale"] == 1.0 and derived["gradient_clipping"] == 0.0
        assert derived["data_types"] == {"grad_accum_dtype": accumulated}
        assert derived["communication_data_type"] == "fp16"
        assert not derived["zero_optimization"]["contiguous_gradients"]
        assert derived["zero_optimization"]["compute_grad_norm"] == (zero == 3)
    for engine in ({"zero": 2}, {"zero": 0, "dtype": "bf16"}):
        with pytest.raises(UserError, match=r"adamw16 is for engine\.dtype=auto, bf16 or fp16 and"):
            ds_config.check(make(engine, kind="adamw16"), 2, CPU)
    with pytest.raises(UserError, match=r"'model' of stage 'x' does not tell of; take engine\.dtype=bf16"):
        ds_config.check_nets(short, {"model": torch.nn.Identity()})
