"""Started by test_adam16_zero.py through the deepspeed launcher: 16-bit parameters and states at ZeRO 1 to 3.

A net that tells of no branches, so that all of it is 16 bits; mixed_checks.py has one that does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from support import checks
from support.rank_checks.engine_checks import BATCH, build_one, fresh_net, images, loss_of, make_config, share_of

from dalle_scale import dist
from dalle_scale.engine import masters, optim, state
from dalle_scale.engine.trained_net import TrainedNet

STEPS = 8


def trained_net_of(zero: int, seed: int = 0, **settings: Any) -> TrainedNet:
    """A net without fp32 around a fresh net."""
    config = make_config(zero, dtype="bf16", kind="adamw16", clip_norm=0.0, betas=(0.9, 0.96), **settings)
    trained_net = build_one(config, seed)["model"]
    optim.set_lr(trained_net.engine.optimizer, 1.0)
    return trained_net


def engine_of(zero: int, seed: int = 0, **settings: Any) -> Any:
    return trained_net_of(zero, seed, **settings).engine


def train(engine: Any, start: int = 0, stop: int = STEPS) -> list[float]:
    """Losses, averaged over the ranks."""
    losses = []
    for step in range(start, stop):
        (batch,) = share_of(images(step % 3), BATCH)
        loss = loss_of(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(dist.all_reduce(loss.detach().clone(), "mean").item())
    return losses


def engine_with_masters(zero: int) -> Any:
    """The same net in bf16 with fp32 weights and moments, and torch's AdamW."""
    config = make_config(zero, dtype="bf16", clip_norm=0.0, betas=(0.9, 0.96))
    engine = build_one(config)["model"].engine
    optim.set_lr(engine.optimizer, 1.0)
    return engine


def state_bytes(engine: Any) -> int:
    """What the optimizer holds on this rank, counted from its tensors."""
    states = engine.optimizer.optimizer.state.values()
    return sum(v.untyped_storage().nbytes() for state in states for v in state.values() if torch.is_tensor(v))


def check_losses_are_near_those_with_fp32_masters(zero: int) -> None:
    if zero == 0:
        return
    want = train(engine_with_masters(zero))
    for rounding, tolerance in (("stochastic", 0.01), ("compensated", 0.001)):
        torch.testing.assert_close(train(engine_of(zero, rounding=rounding)), want, rtol=tolerance, atol=0.0)


def check_stages_agree(zero: int) -> None:
    """Without noise it does not matter where this rank's slices begin and end: bit for bit."""
    if zero == 0:
        return
    assert train(engine_of(zero, rounding="nearest")) == train(engine_of(1, rounding="nearest"))


def check_states_are_16_bits_and_shared_out(zero: int) -> None:
    if zero == 0:
        return
    engine = engine_of(zero)
    train(engine, 0, 1)
    parameters = sum(p.numel() for p in fresh_net().parameters())
    assert all(tensor.dtype == torch.bfloat16 for tensor in masters.owned(engine))
    held = torch.tensor(float(state_bytes(engine)))
    assert 4 <= dist.all_reduce(held, "sum").item() / parameters < 4.3  # slices are padded to equal lengths


def check_resume_is_exact(zero: int) -> None:
    if zero == 0:
        return
    for rounding in ("stochastic", "compensated"):
        engine = engine_of(zero, rounding=rounding)
        train(engine, 0, 4)
        folder = Path(sys.argv[-1]).parent / f"adam16_{zero}_{rounding}"
        state.save(engine, folder)
        dist.barrier()
        want, weights = train(engine, 4), masters.full_state(engine, everywhere=True)
        resumed = engine_of(zero, seed=1, rounding=rounding)
        state.load(resumed, folder)
        assert train(resumed, 4) == want
        for name, tensor in masters.full_state(resumed, everywhere=True).items():
            assert torch.equal(tensor, weights[name]), name


def check_the_average_of_weights_is_fp32(zero: int) -> None:
    if zero == 0:
        return
    trained_net = trained_net_of(zero, ema_decay=0.999)
    want = [tensor.float() for tensor in masters.owned(trained_net.engine)]
    for step in range(3):
        train(trained_net.engine, step, step + 1)
        trained_net.ema.update()
        for average, tensor in zip(want, masters.owned(trained_net.engine), strict=True):
            average.lerp_(tensor.float(), 0.001)
    before = [tensor.clone() for tensor in masters.owned(trained_net.engine)]
    with trained_net.ema.half_precision_parameters():
        for tensor, average in zip(masters.owned(trained_net.engine), want, strict=True):
            assert torch.equal(tensor, average.bfloat16())
    for pair in zip([*masters.owned(trained_net.engine), *trained_net.ema.average], [*before, *want], strict=True):
        assert torch.equal(*pair) and pair[0].dtype == pair[1].dtype


if __name__ == "__main__":
    checks.run(globals())
