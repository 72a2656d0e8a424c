"""Started by test_mixed.py through the deepspeed launcher: fp32 beside 16-bit weights, gradients scaled by branch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from support import checks
from support.rank_checks.engine_checks import make_config
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.engine import build, masters
from dalle_scale.engine.adam16 import AdamW16
from dalle_scale.engine.nodes import shards
from dalle_scale.engine.optim import param_groups
from dalle_scale.engine.trained_net import TrainedNet
from dalle_scale.models.transformer.model import Transformer
from dalle_scale.nn.residual_scaling import branches_of

STEPS, BATCH = 6, 8
SIZES = {"text_vocab": 11, "text_length": 5, "image_vocab": 13, "grid": 3, "width": 16, "heads": 2, "conv_kernel": 3}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fresh_net(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(**SIZES, kinds=("row", "conv"))


def tokens(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 2)
    text = torch.randint(0, 11, (BATCH, 5), generator=generator)
    return text, torch.randint(0, 13, (BATCH, 9), generator=generator)


def loss_of(net: Any, text: Tensor, codes: Tensor) -> Tensor:
    logits = net(text, codes)
    parts = zip(logits, (text, codes), strict=True)
    return sum(nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten()) for scores, wanted in parts)


def trained_net_of(
    zero: int, dtype: str = "bf16", micro: int | None = None, seed: int = 0, **settings: Any
) -> TrainedNet:
    settings = {"rounding": "nearest", "betas": (0.9, 0.96), **settings}
    config = make_config(zero, dtype=dtype, kind="adamw16", micro=micro, **settings)
    nets = {"model": fresh_net(seed)}
    build.share(nets)
    return build.build(config, nets)["model"]


def backward(trained_net: TrainedNet, step: int, micro: int | None = None, factor: float = 1.0) -> float:
    """The loss of this rank's share."""
    share = [part.chunk(dist.world_size())[dist.rank()] for part in tokens(step)]
    total, size = torch.zeros(()), micro or len(share[0])
    for text, codes in zip(*(part.split(size) for part in share), strict=True):
        loss = loss_of(trained_net.engine, text, codes)
        trained_net.backward(loss * factor)
        total += loss.detach() * size / len(share[0])
    return dist.all_reduce(total, "mean").item()


def train(trained_net: TrainedNet, start: int = 0, stop: int = STEPS, micro: int | None = None) -> list[float]:
    losses = []
    for step in range(start, stop):
        losses.append(backward(trained_net, step, micro))
        trained_net.step(step)
    return losses


def everywhere(trained_net: TrainedNet) -> dict[str, Tensor]:
    return masters.full_state(trained_net.engine, everywhere=True)


def reference(dtype: str, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """One process, no engine: the optimizer on the global batch, in fp32 but for the matrices of branches."""
    net = fresh_net()
    config = make_config(1, dtype=dtype, kind="adamw16", rounding="nearest", betas=(0.9, 0.96), **settings)
    section = config.optim["model"]
    for _, parameters in branches_of(net):
        for parameter in parameters:
            parameter.data = parameter.data.to(HALF[dtype]) if parameter.ndim > 1 else parameter.data
    optimizer = AdamW16(param_groups(net, section), section.lr, section.betas, rounding="nearest")
    losses = []
    for step in range(STEPS):
        loss = loss_of(net, *tokens(step))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), section.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: tensor.float() for name, tensor in net.state_dict().items()}


def check_equals_plain_torch(zero: int) -> None:
    if zero == 0:
        return
    before = fresh_net().state_dict()
    for dtype, tolerance in (("bf16", 1e-2), ("fp16", 2e-3)):
        want, weights = reference(dtype)
        for micro in (None, 2):
            trained_net = trained_net_of(zero, dtype, micro)
            torch.testing.assert_close(train(trained_net, micro=micro), want, rtol=tolerance, atol=0.0)
            got = everywhere(trained_net)
            for name in weights.keys() - {f"blocks.{block}.attention.key.bias" for block in (0, 1)}:  # no gradient
                error = (got[name] - weights[name]).norm() / (weights[name] - before[name]).norm()
                assert error < 0.5, (dtype, micro, name, error)  # a step left out is 1


def check_stages_agree(zero: int) -> None:
    """To one rounding to 16 bits of each loss. Not bit for bit: ZeRO 3 gathers weights at other addresses, and sums the
    norm for clipping over other slices, so that other kernels, or the same in another order, round otherwise."""
    if zero > 1:
        for dtype, half in HALF.items():
            losses, want = train(trained_net_of(zero, dtype)), train(trained_net_of(1, dtype))
            torch.testing.assert_close(losses, want, rtol=torch.finfo(half).eps, atol=0.0)


def check_fp32_stays_fp32(zero: int) -> None:
    """No fp32 gradient is rounded to 16 bits on its way at any stage, nor is a weight: most use their last 6 bits, as
    63 of 64 numbers do by chance. Of sums of two numbers of 16 bits only those do whose sizes differ a hundredfold."""
    if zero == 0:
        return
    shares = {}
    for dtype in HALF:
        trained_net = trained_net_of(zero, dtype)
        train(trained_net, stop=2)
        backward(trained_net, 2)
        gradients = [gradient for gradient, _, _ in shards(trained_net.engine)]
        for name, found in (("gradients", gradients), ("weights", masters.owned(trained_net.engine))):
            numbers = torch.cat([torch.zeros(0), *(t.flatten() for t in found if t.dtype == torch.float32)])
            numbers = numbers[numbers != 0]
            shares[name, dtype] = float((numbers.view(torch.int32) & 63 != 0).float().mean())
    assert all(share > 0.5 for share in shares.values()), shares


def check_types_and_no_second_copy(zero: int) -> None:
    if zero == 0:
        return
    trained_net = trained_net_of(zero, "fp16")
    train(trained_net, stop=1)
    parameters = dict(trained_net.module.named_parameters())
    short = {name for name, parameter in parameters.items() if parameter.dtype == torch.float16}
    ends = ("query.weight", "key.weight", "value.weight", "output.weight", "expand.weight", "contract.weight_t")
    assert short == {name for name in parameters if name.endswith(ends)}
    assert {p.dtype for name, p in parameters.items() if name not in short} == {torch.float32}
    held = [p.ds_tensor if zero == 3 else p for p in parameters.values()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    assert all(tensor.untyped_storage().data_ptr() in weights for tensor in masters.owned(trained_net.engine))


def check_an_overflow_skips_the_step_and_one_scale(zero: int) -> None:
    """On one rank alone, in the second of two steps."""
    if zero == 0:
        return
    trained_net = trained_net_of(zero, "fp16")
    train(trained_net, stop=1)
    before, scales = everywhere(trained_net), [scale.value for scale in trained_net._scaling.scales]
    backward(trained_net, 1)
    if dist.rank() == 1 or zero == 3:
        gradient = next(gradient for gradient, group, _ in shards(trained_net.engine) if group["branch"] == 2)
        gradient.view(-1)[0] = torch.inf
    trained_net.step(1)
    for name, tensor in everywhere(trained_net).items():
        assert torch.equal(tensor, before[name]), name
    want = [scale * (2**-0.5 if branch == 2 else 2**0.001) for branch, scale in enumerate(scales)]
    assert [scale.value for scale in trained_net._scaling.scales] == want
    assert trained_net.numbers()["skipped_steps"] == 1 and "log2_scale_min" in trained_net.numbers()
    losses = train(trained_net, 2)
    assert all(torch.tensor(losses).isfinite()) and losses[-1] < losses[0]


def check_scales_rescue_what_fp16_loses(zero: int) -> None:
    """Gradients times 2^-24: AdamW takes nearly the same steps, because the scales keep them representable."""
    if zero == 0:
        return

    def trained(factor: float, value: float) -> dict[str, Tensor]:
        trained_net = trained_net_of(zero, "fp16", eps=1e-30, clip_norm=0.0, states="fp32")
        for step in range(2):
            for scale in trained_net._scaling.scales:
                scale.value = value
            backward(trained_net, step, factor=factor)
            trained_net.step(step)
        return everywhere(trained_net)

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        name = "blocks.0.expand.weight"
        return float((a[name] - b[name]).norm())

    want = trained(1.0, 2.0**10)
    assert distance(trained(2.0**-24, 2.0**24), want) < 0.1 * distance(trained(2.0**-24, 1.0), want)


def check_resume_is_exact(zero: int) -> None:
    if zero == 0:
        return
    trained_net = trained_net_of(zero, "fp16", rounding="stochastic", ema_decay=0.9)
    train(trained_net, stop=3)
    folder = Path(sys.argv[-1]).parent / f"mixed_{zero}"
    trained_net.save(folder)
    dist.barrier()
    resumed = trained_net_of(zero, "fp16", seed=1, rounding="stochastic", ema_decay=0.9)
    resumed.load(folder)
    assert train(trained_net, 3) == train(resumed, 3)
    want, got = everywhere(trained_net), everywhere(resumed)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert trained_net._scaling.state() == resumed._scaling.state()


if __name__ == "__main__":
    checks.run(globals())
