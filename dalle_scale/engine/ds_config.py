"""The DeepSpeed configuration, derived from ours. Nobody writes one by hand.

Every key that changes what is computed is stated, because DeepSpeed's defaults are not neutral: leaving out
`gradient_clipping` clips at 1.0 (DeepSpeed 0.19).
"""

from __future__ import annotations

from typing import Any

import torch

from dalle_scale.config import RunConfig
from dalle_scale.nn.residual_scaling import branches_of
from dalle_scale.types import Nets, UserError

# Elements in flight in one collective: 64 MiB of fp32. DeepSpeed's default is 2 GB of extra memory per rank.
BUCKET_ELEMENTS = 16 * 1024 * 1024


def derive(config: RunConfig, net: str, world_size: int) -> dict[str, Any]:
    """The configuration of the engine of one net. DeepSpeed sees the ranks and the batch of one node.

    With adamw16 it sees a net of fp32, has no scale of losses, and leaves norms and clipping to us (mixed.py,
    scaling.py).
    """
    engine, optim = config.engine, config.optim[net]
    assert engine.dtype != "auto", "precision.resolve comes first"
    mixed = optim.kind == "adamw16"
    needs_norm = not mixed and (optim.clip_norm > 0 or engine.dtype != "fp32")
    # At ZeRO 3 gradients pass through this type on their way to where they are kept
    accumulated = "fp32" if mixed and engine.zero == 3 else engine.dtype
    return {
        "train_batch_size": config.global_batch_size // engine.nodes,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.accumulation(world_size),
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0 if mixed else optim.clip_norm,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": engine.dtype,
        "data_types": {"grad_accum_dtype": accumulated},  # buffer_dtype stays unset: buffers keep fp32
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(engine.zero, needs_norm, one_type=not mixed),
        "bf16": {
            "enabled": engine.dtype == "bf16" and not mixed,
            "immediate_grad_update": True,
            "check_grad_overflow": True,
        },
        "fp16": {
            "enabled": engine.dtype == "fp16" and not mixed,
            "auto_cast": False,
            "loss_scale": 1.0 if mixed else 0,  # 0: dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        },
        "torch_autocast": {"enabled": False},
        "checkpoint": {"tag_validation": "Ignore"},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every step
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def check(config: RunConfig, world_size: int, device: torch.device | None) -> None:
    """Refuse what the engine cannot do, before anything is allocated; on no `device` (a dry run) what none could do.

    Raises:
        UserError: a batch that does not divide, or a precision or optimizer that does not go with ZeRO or the device.
    """
    config.micro_batch_size(world_size)
    engine = config.engine
    global_scale = engine.dtype == "fp16" and any(optim.kind != "adamw16" for optim in config.optim.values())
    if global_scale and device is not None and device.type == "cpu":
        raise UserError("engine.dtype: fp16 needs a GPU; on a CPU take auto, fp32 or bf16")
    if engine.dtype == "fp16" and engine.zero == 0:
        # DeepSpeed 0.19 unscales the gradients at ZeRO 0 without having scaled the loss
        raise UserError("engine.dtype: fp16 needs engine.zero=1, 2 or 3 (also with a single process)")
    if world_size % engine.nodes:
        raise UserError(f"engine.nodes: {engine.nodes}, but {world_size} processes do not divide among them")
    if engine.zero == 0 and (engine.nodes > 1 or engine.compression_rank):
        raise UserError("engine.nodes and engine.compression_rank: need engine.zero=1, 2 or 3 inside a node")
    if global_scale and engine.compression_rank:
        # what it leaves out of a gradient keeps the loss scale of that step, which DeepSpeed changes
        raise UserError("engine.compression_rank: goes with engine.dtype=fp16 only where optim kind is adamw16")
    for net, optim in config.optim.items():
        if optim.kind == "adamw16" and (engine.dtype == "fp32" or engine.zero == 0):
            raise UserError(
                f"optim.{net}.kind: adamw16 is for engine.dtype=auto, bf16 or fp16 and engine.zero=1, 2 or 3"
            )
        if optim.kind == "muon" and engine.zero > 0:
            raise UserError(
                f"optim.{net}.kind: muon needs whole matrices, ZeRO {engine.zero} cuts them; "
                f"take engine.zero=0 or optim.{net}.kind=adamw"
            )


def check_nets(config: RunConfig, nets: Nets) -> None:
    """Raises UserError unless `optim:` has one entry for each net, and adamw16 in fp16 branches to scale."""
    if set(config.optim) != set(nets):
        raise UserError(
            f"optim: has entries for {', '.join(config.optim)}, stage '{config.stage}' trains {', '.join(nets)}"
        )
    for name, net in nets.items():
        if config.optim[name].kind == "adamw16" and config.engine.dtype == "fp16" and not branches_of(net):
            raise UserError(
                f"optim.{name}.kind: adamw16 with engine.dtype=fp16 scales the gradients of residual branches, which "
                f"'{name}' of stage '{config.stage}' does not tell of; take engine.dtype=bf16 or kind=adamw"
            )


def _zero(stage: int, needs_norm: bool, one_type: bool) -> dict[str, Any]:
    """The `zero_optimization` section. one_type: all gradients have the same, so that they fit into one buffer."""
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": one_type,
        "reduce_scatter": True,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "elastic_checkpoint": False,
        "load_from_fp32_weights": True,
        "compute_grad_norm": True,
    }
    if stage in (1, 2):
        section["compute_grad_norm"] = needs_norm
    if stage == 3:
        section |= {
            "sub_group_size": 1_000_000_000,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return section
