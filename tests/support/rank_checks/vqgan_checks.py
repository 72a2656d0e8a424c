"""Started by test_vqgan_engines.py through the deepspeed launcher: VQGAN's two nets against plain PyTorch.

The reference is a loop that trains on the global batch with two optimizers, and takes lambda by its definition:
autograd through the decoder to the weight of its last convolution.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import torch.nn.functional as F
from support import checks
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.config import RunConfig, parse
from dalle_scale.engine import build, masters, optim
from dalle_scale.nn.lpips import build_lpips
from dalle_scale.stages.vqgan import Stage

BATCH, DECAY = 8, 0.6
MODEL = {
    "image_size": 16,
    "width": 4,
    "multipliers": (1, 2),
    "blocks_per_group": 1,
    "norm_groups": 2,
    "dim": 4,
    "quantizer": {"vocab": 16, "ema_decay": 0.8, "restart_below": 0.05},
    "perceptual": {"kind": "none"},  # VGG16 takes most of the time where it is asked for below
    "discriminator": {"width": 4, "layers": 1, "norm_groups": 2},
    "discriminator_start": 1,
    "discriminator_warmup_steps": 1,
    "adaptive_decay": DECAY,
    "lecam_weight": 0.3,
    "lecam_decay": DECAY,
}
FROM_THE_START = {"discriminator_start": 0, "discriminator_warmup_steps": 0}
IntArray = list[dict[str, float]]
REFERENCES: dict[str, tuple[dict[str, nn.Module], IntArray]] = {}


def make_config(zero: int, micro: int | None, steps: int = 4, dtype: str = "fp32", **model: Any) -> RunConfig:
    # Where a gradient is zero in theory (bias of attention keys), Adam with a small eps would walk on its rounding;
    # and what differs in the last digit grows with every kink of the losses
    section = {"lr": 0.02, "betas": (0.5, 0.9), "eps": 0.01}
    engine = {"zero": zero, "dtype": dtype, "micro_batch_size": micro}
    tree = {"stage": "vqgan", "run": "x", "steps": steps, "global_batch_size": BATCH, "data": {"train": "x"}}
    nets = dict.fromkeys(("model", "discriminator"), section)
    return parse(RunConfig, {**tree, "engine": engine, "optim": nets, "model": {**MODEL, **model}}, "test")


def make_stage(config: RunConfig) -> tuple[Stage, dict[str, nn.Module]]:
    torch.manual_seed(5)
    stage = Stage(parse(Stage.Config, config.model, "test"))
    return stage, stage.nets()


def global_batch(step: int) -> dict[str, Tensor]:
    """Flat colours with a little noise; the sixth slot is empty."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.randint(0, 200, (BATCH, 3, 1, 1), generator=generator)
    images = colours + torch.randint(0, 56, (BATCH, 3, 16, 16), generator=generator)
    weight = torch.full((BATCH,), BATCH / (BATCH - 1))
    weight[5] = 0
    return {"image": images.to(torch.uint8), "seed": torch.arange(BATCH) + 100 * step, "weight": weight}


def share_of(batch: dict[str, Tensor], micro: int) -> list[dict[str, Tensor]]:
    """This rank's micro-batches."""
    rank, size = dist.rank(), BATCH // dist.world_size()
    starts = range(rank * size, (rank + 1) * size, micro)
    return [{key: value[start : start + micro] for key, value in batch.items()} for start in starts]


def train(config: RunConfig, stage: Stage, trained_nets: build.TrainedNets) -> IntArray:
    """What each step of each net reported, over all ranks."""
    numbers = []
    for step in range(config.steps):
        found: dict[str, Tensor] = {}
        for net_name in stage.nets_to_update(step):
            resting = {name: trained_net.module for name, trained_net in trained_nets.items() if name != net_name}
            micro_batches = share_of(global_batch(step), config.micro_batch_size(dist.world_size()))
            with trained_nets.updating(net_name) as nets:
                for batch in micro_batches:
                    losses = stage.loss(net_name, nets, batch, step)
                    trained_nets[net_name].backward(losses.total)
                    for name, value in {"loss": losses.total.detach(), **losses.terms}.items():
                        key = f"{net_name}/{name}"
                        found[key] = found.get(key, torch.zeros(())) + value / len(micro_batches)
                trained_nets[net_name].step(step)
            for net in resting.values():
                assert all(parameter.grad is None for parameter in net.parameters()), "a resting net got a gradient"
        stage.after_step(trained_nets.modules, step)
        numbers.append({name: dist.all_reduce(value.clone(), "mean").item() for name, value in found.items()})
    return numbers


def reference(config: RunConfig) -> tuple[dict[str, nn.Module], IntArray]:
    """The same without engines, ranks and micro-batches; made once for all ZeRO stages."""
    key = json.dumps([config.steps, config.model])
    if key not in REFERENCES:
        stage, nets = make_stage(config)
        shared, dist.all_reduce = dist.all_reduce, lambda tensor, op="sum": tensor  # this rank sees the whole batch
        try:
            REFERENCES[key] = nets, list(plain_steps(config, stage, nets))
        finally:
            dist.all_reduce = shared
    return REFERENCES[key]


def plain_steps(config: RunConfig, stage: Stage, nets: dict[str, Any]) -> Any:
    model, critic, c = nets["model"], nets["discriminator"], stage.config
    lpips = None if c.perceptual.kind == "none" else build_lpips(c.perceptual)
    optimizers = {name: optim.build(net, config.optim[name]) for name, net in nets.items()}
    norms, logits = Average(), Average()
    for step in range(config.steps):
        batch = global_batch(step)
        kept = batch["weight"] > 0
        images = batch["image"][kept].float() / 127.5 - 1
        found: dict[str, float] = {}

        def update(name: str, loss: Tensor, found: dict[str, float] = found) -> None:
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            found[f"{name}/loss"] = loss.item()

        quantized = model.quantizer(model.encoder(images), None, batch["seed"][kept])
        made = model.decoder(quantized.values)[0]
        likeness = F.l1_loss(made, images) + (lpips(made, images).mean() if lpips else 0.0)
        total = likeness + quantized.loss.mean()
        if step >= c.judged_from:
            verdict = -critic(made).mean()
            factor = norms.value[0] / (norms.value[1] + 1e-6) if norms.mass else 0.0
            factor = factor if c.adaptive_weight else 1.0
            weight = model.decoder.output.weight
            sizes = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (likeness, verdict)]
            norms.update([size.item() for size in sizes])
            total = total + 0.8 * factor * verdict
            found |= {"model/lambda": float(factor), "model/gan": verdict.item()}
        update("model", total)
        if step >= c.discriminator_start:
            with torch.no_grad():
                made = model.decoder(model.quantizer(model.encoder(images)).values)[0]
            real, fake = critic(images), critic(made)
            total = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
            if logits.mass:
                pull = (real - logits.value[1]).square().mean() + (fake - logits.value[0]).square().mean()
                total = total + 0.3 * pull
            logits.update([real.mean().item(), fake.mean().item()])
            update("discriminator", total)
        model.quantizer.after_step(step)
        yield found
    critic.logits.sums.copy_(torch.tensor(logits.sums))
    critic.logits.mass.fill_(logits.mass)


class Average:
    """Two moving averages without the bias to 0."""

    def __init__(self) -> None:
        self.sums, self.mass = [0.0, 0.0], 0.0

    def update(self, values: list[float]) -> None:
        self.sums = [DECAY * old + (1 - DECAY) * new for old, new in zip(self.sums, values, strict=True)]
        self.mass = DECAY * self.mass + 1 - DECAY

    @property
    def value(self) -> list[float]:
        return [total / self.mass for total in self.sums]


def start(config: RunConfig) -> tuple[Stage, build.TrainedNets]:
    stage, nets = make_stage(config)
    build.share(nets)
    return stage, build.build(config, nets)


def assert_equals_reference(config: RunConfig) -> tuple[Stage, build.TrainedNets]:
    stage, trained_nets = start(config)
    got = train(config, stage, trained_nets)
    nets, want = reference(config)
    for step, (line, expected) in enumerate(zip(got, want, strict=True)):
        for name, value in expected.items():
            label = f"update {step}, {name}: "
            loose = 10.0 if step else 0.1  # from the second on of weights that a kink may have moved apart, see below
            close = {"rtol": 1e-4 * loose, "atol": 1e-5 * loose}
            torch.testing.assert_close(line[name], value, **close, msg=lambda m, at=label: at + m)
        assert ("model/gan" in line) == ("model/gan" in expected) and line.keys() >= expected.keys()
    compared = 0
    _, fresh = make_stage(config)
    for name, net in nets.items():
        state, before = masters.full_state(trained_nets[name].engine, everywhere=True), fresh[name].state_dict()
        for key, tensor in net.state_dict().items():
            if key.startswith("gradient_norms"):
                continue  # the reference keeps its own
            compared += 1
            # One number may cross a kink by rounding: a pixel within 1e-7 of its target has the other sign in L1, which
            # moves what is behind it by some 0.2 % of the way. A step left out is a quarter, a sample a tenth.
            error, way = (float((one - tensor).double().norm()) for one in (state[key], before[key]))
            assert error <= 0.01 * way + 2e-5 * tensor.numel() ** 0.5, f"{key}: {error} of {way}"
    assert compared > 60
    return stage, trained_nets


def check_equals_plain_torch(zero: int) -> None:
    """In two micro-batches a rank, with an empty slot, restarts, LeCam, lambda of the steps before. Then validation
    changes neither averages nor codes."""
    stage, trained_nets = assert_equals_reference(make_config(zero, BATCH // dist.world_size() // 2))
    before = copy.deepcopy([dict(module.named_buffers()) for module in trained_nets.modules.values()])
    with trained_nets.evaluating() as nets:
        for net_name in stage.nets_to_update(4):
            assert stage.loss(net_name, nets, share_of(global_batch(0), 4)[0], 4).total.isfinite()
    assert not stage._gradients and not stage._logits
    stage.after_step(trained_nets.modules, 4)
    for old, module in zip(before, trained_nets.modules.values(), strict=True):
        assert all(torch.equal(old[name], buffer) for name, buffer in module.named_buffers())


def check_perceptual_and_fixed_weight(zero: int) -> None:
    changes = {"adaptive_weight": False, "perceptual": {"kind": "random"}, **FROM_THE_START}
    _, trained_nets = assert_equals_reference(make_config(zero, None, steps=1, **changes))
    for name, trained_net in trained_nets.items():
        assert not any("features" in key for key in trained_net.module.state_dict()), name


def check_bf16(zero: int) -> None:
    """Near fp32; buffers stay fp32, equal on all ranks."""
    config = make_config(zero, 4, steps=2, dtype="bf16", **FROM_THE_START)
    stage, trained_nets = start(config)
    got, (_, want) = train(config, stage, trained_nets), reference(config)
    for name in ("model/loss", "discriminator/loss", "model/lambda"):
        values = [torch.tensor([line[name] for line in lines]) for lines in (got, want)]
        torch.testing.assert_close(*values, rtol=0.1, atol=0.03)
    for module in trained_nets.modules.values():
        for name, buffer in module.named_buffers():
            assert buffer.dtype == torch.float32, name
            assert torch.equal(dist.broadcast(buffer.clone()), buffer), name
    assert next(trained_nets["model"].module.parameters()).dtype == torch.bfloat16


if __name__ == "__main__":
    checks.run(globals())
