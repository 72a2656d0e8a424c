"""Started by test_engine.py through the deepspeed launcher: checks of engines against plain PyTorch, in one launch.

Every check runs at every ZeRO stage; the reference is an undistributed loop over the global batch.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from support import checks
from support.autoencoder import Net
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.config import RunConfig, parse
from dalle_scale.engine import build, masters, optim

BATCH, STEPS = 8, 6


def make_config(zero: int, net: str = "model", dtype: str = "fp32", micro: int | None = None, **settings: Any):
    section = {"lr": 0.01, "weight_decay": 0.1, "clip_norm": 0.3, **settings}
    engine = {"zero": zero, "dtype": dtype, "micro_batch_size": micro}
    names = net.split("+")
    tree = {"stage": "x", "run": "x", "steps": STEPS, "global_batch_size": BATCH, "data": {"train": "x"}}
    return parse(RunConfig, {**tree, "engine": engine, "optim": dict.fromkeys(names, section)}, "test")


def images(step: int) -> Tensor:
    return torch.randint(0, 256, (BATCH, 3, 8, 8), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)


def share_of(batch: Tensor, micro: int) -> list[Tensor]:
    """This rank's micro-batches."""
    return list(batch.chunk(dist.world_size())[dist.rank()].split(micro))


def loss_of(net: Any, batch: Tensor) -> Tensor:
    return (net(batch).float() - batch.float() / 127.5 + 1).pow(2).mean()


def fresh_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(8, 16)


def reference(config: RunConfig, steps: int = STEPS) -> tuple[nn.Module, list[float], dict[str, Tensor]]:
    """The same training without engine: net, losses, average of the weights."""
    net, section = fresh_net(), config.optim["model"]
    average = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = optim.build(net, section)
    losses = []
    for step in range(steps):
        loss = loss_of(net, images(step))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), section.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        for name, weights in net.named_parameters():
            average[name] = section.ema_decay * average[name] + (1 - section.ema_decay) * weights.detach()
    return net, losses, average


def train(
    trained_nets: build.TrainedNets, config: RunConfig, start: int = 0, stop: int = STEPS, factor: float = 1.0
) -> list[float]:
    """Losses, averaged over the ranks; `factor` times them is back-propagated."""
    trained_net, losses = trained_nets["model"], []
    for step in range(start, stop):
        total = torch.zeros(())
        micro_batches = share_of(images(step), config.micro_batch_size(dist.world_size()))
        with trained_nets.updating("model") as nets:
            for batch in micro_batches:
                loss = loss_of(nets["model"], batch)
                trained_net.backward(loss * factor)
                total += loss.detach() / len(micro_batches)
            trained_net.step(step)
        losses.append(dist.all_reduce(total, "mean").item())
    return losses


def build_one(config: RunConfig, seed: int = 0) -> build.TrainedNets:
    nets = {"model": fresh_net(seed)}
    build.share(nets)
    return build.build(config, nets)


@contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """DeepSpeed refuses fp16 on CPUs because it is slow there; the arithmetic is right."""
    supported, get_accelerator().is_fp16_supported = get_accelerator().is_fp16_supported, lambda: True
    try:
        yield
    finally:
        get_accelerator().is_fp16_supported = supported


def everywhere(trained_nets: build.TrainedNets) -> dict[str, Tensor]:
    return masters.full_state(trained_nets["model"].engine, everywhere=True)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_equals_plain_torch(zero: int) -> None:
    """AdamW with decay by role, clipping and accumulation; sums of other order differ by rounding: 1e-5 allowed."""
    for micro in (None, 2):
        config = make_config(zero, micro=micro, ema_decay=0.7)
        trained_nets = build_one(config)
        net, losses, average = reference(config)
        torch.testing.assert_close(train(trained_nets, config), losses, rtol=1e-5, atol=1e-6)
        assert_close(everywhere(trained_nets), net.state_dict(), 1e-5)
        state = trained_nets["model"].full_state()
        assert bool(state) == dist.is_main()
        if state:
            assert_close(state, average, 1e-5)


def check_evaluation_leaves_no_trace(zero: int) -> None:
    """`evaluating` computes with the average, whole, and the training continues bit for bit as without it."""
    config = make_config(zero, ema_decay=0.7)
    plain, disturbed = build_one(config), build_one(config)
    want = train(plain, config)
    got = train(disturbed, config, 0, 3)
    _, _, average = reference(config, steps=3)
    with disturbed.evaluating() as nets:
        assert not nets["model"].training
        assert_close(dict(nets["model"].state_dict()), average, 1e-5)
        assert torch.isfinite(nets["model"].down(torch.ones(1, 256))).all()  # not through forward
        assert torch.isfinite(nets["model"].mix.weight @ torch.ones(16)).all()  # not even through a module
    assert disturbed["model"].module.training
    got += train(disturbed, config, 3)
    assert got == want, f"{got} != {want}"
    for name, tensor in everywhere(plain).items():
        assert torch.equal(tensor, everywhere(disturbed)[name]), name


def check_buffers_come_from_rank_0_in_fp32(zero: int) -> None:
    for dtype in ("fp32", "bf16"):
        net = fresh_net(seed=100 + dist.rank())
        net.seen.fill_(dist.rank() + 5.0)
        build.share({"model": net})
        trained_nets = build.build(make_config(zero, dtype=dtype), {"model": net})
        assert net.seen.dtype == torch.float32 and net.seen.item() == 5.0
        assert net.steps.dtype == torch.int64
        torch.testing.assert_close(
            everywhere(trained_nets)["down.weight"], fresh_net(100).down.weight.data, rtol=0.01, atol=0.01
        )


def check_bf16(zero: int) -> None:
    """16-bit weights, fp32 masters: near the fp32 run, and the average still moves where 16 bits would not."""
    config = make_config(zero, dtype="bf16", ema_decay=0.9999, weight_decay=0.0)
    trained_nets = build_one(config)
    _, losses, average = reference(make_config(zero, ema_decay=0.9999, weight_decay=0.0))
    torch.testing.assert_close(train(trained_nets, config), losses, rtol=0.03, atol=0.0)
    assert trained_nets["model"].module.down.weight.dtype == torch.bfloat16
    moved = trained_nets["model"].full_state()
    if moved:
        start = fresh_net().down.weight.detach().to(torch.bfloat16).float()
        travelled = (moved["down.weight"] - start).norm()
        reach = (average["down.weight"] - fresh_net().down.weight.detach()).norm()
        torch.testing.assert_close(travelled, reach, rtol=0.15, atol=0.0)


def check_fp16(zero: int) -> None:
    """Overflow at the first loss scales is skipped and told, then training continues; without it all is near fp32."""
    if zero == 0:
        return
    config = make_config(zero, dtype="fp16", weight_decay=0.0)
    with fp16_on_cpu():
        calm, stormy = build_one(config), build_one(config)
        losses = train(calm, config)
        overflowing = train(stormy, config, factor=20.0)
    torch.testing.assert_close(losses, reference(make_config(zero, weight_decay=0.0))[1], rtol=0.01, atol=0.0)
    assert calm["model"].numbers() == {"lr": 0.01, "loss_scale": 2.0**16, "skipped_steps": 0}
    numbers = stormy["model"].numbers()
    assert 0 < numbers["skipped_steps"] < STEPS and numbers["loss_scale"] < 2.0**16
    assert overflowing[-1] < overflowing[0]


def check_checkpoint_is_exact(zero: int) -> None:
    """fp16 overflows in the first steps, so that its loss scale is not what it starts with."""
    kinds = [("fp32", "adamw"), ("bf16", "adamw"), ("fp16", "adamw") if zero else ("fp32", "muon")]
    for dtype, kind in kinds:
        config = make_config(zero, dtype=dtype, ema_decay=0.7, kind=kind, schedule={"kind": "cosine"})
        factor = 20.0 if dtype == "fp16" else 1.0
        folder = Path(sys.argv[-1]).parent / f"checkpoint_{zero}_{dtype}_{kind}"
        with fp16_on_cpu():
            trained_nets = build_one(config)
            train(trained_nets, config, 0, 3, factor)
            trained_nets["model"].save(folder)
            dist.barrier()
            want, weights = train(trained_nets, config, 3, factor=factor), everywhere(trained_nets)
            resumed = build_one(config, seed=1)
            resumed["model"].load(folder)
            assert train(resumed, config, 3, factor=factor) == want
        first, second = ({**p["model"].numbers(), "skipped_steps": None} for p in (trained_nets, resumed))
        assert first == second  # steps are counted from the start of a process
        for name, tensor in everywhere(resumed).items():
            assert torch.equal(tensor, weights[name]), name
        first, second = trained_nets["model"].full_state(), resumed["model"].full_state()
        assert all(torch.equal(first[name], second[name]) for name in first)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)


def adversarial_losses(net_name: str, nets: dict[str, Any], batch: Tensor) -> Tensor:
    made = nets["model"](batch)
    if net_name == "model":
        return loss_of(lambda _: made, batch) - nets["critic"](made).mean()
    return nn.functional.softplus(nets["critic"](made.detach())).mean()


def check_two_nets(zero: int) -> None:
    """Generator and critic in turns equal two plain optimizers; the critic rests in the other's turn."""
    config = make_config(zero, net="model+critic", clip_norm=0.0)
    torch.manual_seed(3)
    critic = Critic()
    plain = {"model": fresh_net(), "critic": copy.deepcopy(critic)}
    optimizers = {name: optim.build(net, config.optim[name]) for name, net in plain.items()}
    nets = {"model": fresh_net(), "critic": critic}
    build.share(nets)
    trained_nets = build.build(config, nets)
    for step in range(4):
        for net_name in ("model", "critic"):
            before = masters.full_state(trained_nets["critic"].engine, everywhere=True)
            (batch,) = share_of(images(step), BATCH)
            with trained_nets.updating(net_name) as seen:
                loss = adversarial_losses(net_name, seen, batch)
                trained_nets[net_name].backward(loss)
                trained_nets[net_name].step(step)
            want = adversarial_losses(net_name, plain, images(step))
            want.backward()
            optimizers[net_name].step()
            for net in plain.values():
                net.zero_grad()
            mean = dist.all_reduce(loss.detach().clone(), "mean")
            torch.testing.assert_close(mean, want.detach(), rtol=1e-5, atol=1e-6)
            if net_name == "model":
                after = masters.full_state(trained_nets["critic"].engine, everywhere=True)
                assert all(torch.equal(before[name], after[name]) for name in before)


def check_muon(zero: int) -> None:
    """The ranks share the work; the result is that of one process, identical on all ranks."""
    if zero > 0:
        return
    config = make_config(zero, kind="muon", muon_lr=0.02)
    trained_nets = build_one(config)
    net, losses, _ = reference_muon(config)
    torch.testing.assert_close(train(trained_nets, config), losses, rtol=1e-5, atol=1e-6)
    assert_close(everywhere(trained_nets), net.state_dict(), 2e-5)
    for tensor in everywhere(trained_nets).values():
        first = dist.broadcast(tensor.clone())
        assert torch.equal(first, tensor)


def reference_muon(config: RunConfig) -> tuple[nn.Module, list[float], dict[str, Tensor]]:
    """`reference`, with every rank doing all of the orthogonalisation."""
    with mock.patch.object(optim.Muon, "_directions", _directions_alone):
        return reference(config)


@contextmanager
def _directions_alone(muon: optim.Muon, gradients: list[Tensor], momenta: list[Tensor]) -> Iterator[list[Tensor]]:
    pairs = zip(gradients, momenta, strict=True)
    yield [optim.orthogonalise(gradient.lerp(momentum, muon.momentum)[None])[0] for gradient, momentum in pairs]


def check_not_finite_is_noticed(zero: int) -> None:
    """One rank's loss is NaN: that rank knows, and no rank's weights pass for sound unless the step was refused."""
    config = make_config(zero)
    trained_net = build_one(config)["model"]
    last = dist.rank() == dist.world_size() - 1
    (batch,) = share_of(images(0), BATCH)
    trained_net.backward(loss_of(trained_net.engine, batch) * (float("nan") if last else 1.0))
    try:
        trained_net.step(0)
    except ValueError as error:
        assert "gradients of 'model' are not finite" in str(error)
    else:
        assert not trained_net.healthy()
    assert trained_net.losses_finite() == (not last)


def check_memory_that_was_not_set_is_no_weight(zero: int) -> None:
    """At ZeRO 3 slices of a parameter whose size the ranks do not divide are longer than it, by unset memory."""
    kept, nets = torch.empty, {"model": nn.Linear(3, 3)}
    build.share(nets)

    def poisoned(*arguments: Any, **settings: Any) -> Tensor:
        tensor = kept(*arguments, **settings)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    torch.empty = poisoned
    try:
        trained_net = build.build(make_config(zero), nets)["model"]
    finally:
        torch.empty = kept
    assert trained_net.healthy()


if __name__ == "__main__":
    checks.run(globals())
