"""Started by test_reshard.py through the deepspeed launcher: with 2 processes engines are saved at every ZeRO stage, by
any other number they are loaded at every stage and compared.

What was saved is known in two ways. The whole weights were gathered by DeepSpeed, which knows nothing of the files. All
else is set, number by number, to functions of the weight in the same place, and must be so again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import load_file, save_file
from support import checks
from support.rank_checks.engine_checks import fp16_on_cpu, make_config, train
from torch import Tensor, nn

from dalle_scale import dist
from dalle_scale.engine import build, masters
from dalle_scale.engine.trained_net import TrainedNet
from dalle_scale.nn.residual_scaling import BranchScale
from dalle_scale.types import UserError

WRITERS = 2
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},  # not at ZeRO 0
    "adamw16": {"dtype": "bf16", "kind": "adamw16", "rounding": "compensated", "states": "fp32", "clip_norm": 0.0},
    "muon": {"dtype": "fp32", "kind": "muon"},  # at ZeRO 0 only
}
STAGES = {"fp16": (1, 2, 3), "adamw16": (1, 2, 3), "muon": (0,)}
COUNTS = {"cur_scale": 512.0, "cur_iter": 11, "last_overflow_iter": 4}


class Odd(nn.Module):
    """Parameters whose sizes no number of ranks divides, a group of so few numbers that the last of four ranks has none
    of them, a frozen parameter and a buffer. With adamw16 in fp32 but for one branch, which is in 16 bits."""

    frozen: nn.Parameter
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(192, 5)
        self.up = nn.Linear(5, 192, bias=False)
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("seen", torch.randn(3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, 8, 8] -> float of the same shape."""
        x = images.to(self.down.weight.dtype) / 127.5 - 1
        return self.up(torch.tanh(self.down(x.flatten(1))).to(self.up.weight.dtype)).view_as(x)

    def branches(self) -> list[tuple[BranchScale, list[nn.Parameter]]]:
        return [(BranchScale(), [self.up.weight])]


def cases(zero: int) -> list[str]:
    return [name for name in CASES if zero in STAGES.get(name, checks.STAGES)]


def folder_of(case: str, zero: int) -> Path:
    return Path(sys.argv[-1]).parent / f"{case}_{zero}"


def trained_net_of(case: str, zero: int, seed: int) -> tuple[build.TrainedNets, Any]:
    config = make_config(zero, ema_decay=0.7, **CASES[case])
    torch.manual_seed(seed)
    nets: dict[str, nn.Module] = {"model": Odd()}
    build.share(nets)
    return build.build(config, nets), config


def derived(weights: Tensor, like: Tensor, kind: str) -> Tensor:
    """A state that tells where it belongs: of `like`'s type and shape, in 16 bits any bits, also those of no number."""
    salt = 1 + 2 * sum(kind.encode())
    if like.dtype == torch.float32:
        return (weights.float() * salt + 1).view(like.shape)
    values = [weights.view(torch.int16) * (salt + 2 * index) for index in range(like.numel() // weights.numel())]
    return torch.stack(values, dim=-1).flatten().view(like.dtype).view(like.shape)


def states_of(trained_net: TrainedNet) -> list[tuple[Tensor, Tensor, str]]:
    """(weights, state, its name) of all that lies number by number beside this rank's weights."""
    found = []
    assert trained_net.ema is not None
    for index, key in enumerate(masters.keys(trained_net.engine)):
        found.append((key.data, trained_net.ema.average[index], "average"))
        state = masters.states(trained_net.engine)[key]
        found += [(key.data, value, name) for name, value in state.items() if torch.is_tensor(value) and value.ndim]
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def save(zero: int) -> None:
    """`trained` in the middle of a training, with the losses that followed, and `marked`, with the whole weights."""
    for case in cases(zero):
        folder = folder_of(case, zero)
        trained_nets, config = trained_net_of(case, zero, seed=0)
        trained_net = trained_nets["model"]
        train(trained_nets, config, 0, 2)
        trained_net.save(folder / "trained")
        (folder / "losses.json").write_text(json.dumps(train(trained_nets, config, 2, 5)))
        for weights, state, kind in states_of(trained_net):
            state.copy_(derived(weights, state, kind))
        trained_net.engine.skipped_steps = 3
        if case == "fp16":
            vars(trained_net.engine.optimizer.loss_scaler).update(COUNTS)
        trained_net.module.seen.fill_(7.0)
        trained_net.save(folder / "marked")
        whole = masters.full_state(trained_net.engine)
        if dist.is_main():
            save_file(whole, folder / "whole.safetensors")


def check_whole(zero: int) -> None:
    """Saved by 2 processes at any stage, and bit for bit the same here at this one."""
    if dist.world_size() == WRITERS:
        with fp16_on_cpu():
            save(zero)
        return
    for case in cases(zero):
        for before in STAGES.get(case, checks.STAGES):
            with fp16_on_cpu():
                trained_net = trained_net_of(case, zero, seed=1 + dist.rank())[0]["model"]
            trained_net.load(folder_of(case, before) / "marked")
            want = load_file(folder_of(case, before) / "whole.safetensors")
            compare(trained_net, want)
            assert trained_net.engine.skipped_steps == 3
            if case == "fp16":
                assert COUNTS.items() <= vars(trained_net.engine.optimizer.loss_scaler).items()
            checked = 0
            for weights, state, kind in states_of(trained_net):
                real = weights.view(-1) != 0  # padding is zero
                assert real.any() or weights.numel() < 8
                expected = derived(weights, state, kind)
                values = state.numel() // weights.numel()
                where = real.repeat_interleave(values).view(state.shape)
                assert torch.equal(bits(state)[where], bits(expected)[where]), (case, before, kind)
                checked += 1
            assert checked >= 3


def compare(trained_net: TrainedNet, want: dict[str, Tensor]) -> None:
    """Masters, working weights, frozen parameters and buffers, on every rank."""
    got = masters.full_state(trained_net.engine, everywhere=True)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    with GatheredParameters(list(trained_net.module.parameters())):
        for name, parameter in trained_net.module.named_parameters():
            assert torch.equal(parameter, want[name].to(parameter.dtype)), name
    assert torch.equal(trained_net.module.seen, torch.full((3,), 7.0))


def check_goes_on(zero: int) -> None:
    """The losses after loading are those that the 2 processes continued with, to rounding."""
    if dist.world_size() > 1:
        return
    for case in cases(zero):
        tolerance = 1e-5 if CASES[case]["dtype"] == "fp32" else 0.01
        for before in STAGES.get(case, checks.STAGES):
            with fp16_on_cpu():
                trained_nets, config = trained_net_of(case, zero, seed=1)
                trained_nets["model"].load(folder_of(case, before) / "trained")
                losses = train(trained_nets, config, 2, 5)
            want = json.loads((folder_of(case, before) / "losses.json").read_text())
            torch.testing.assert_close(losses, want, rtol=tolerance, atol=0.0)


def check_other_parameters_are_refused(zero: int) -> None:
    if dist.world_size() > 1:
        return
    trained_net = trained_net_of("fp32", zero, seed=0)[0]["model"]
    folder = folder_of("fp32", zero) / "other"
    layout = shutil.copytree(folder_of("fp32", zero) / "marked", folder) / "model" / "layout.json"
    document = json.loads(layout.read_text())
    document["parameters"]["down.bias"]["shape"] = [6]
    layout.write_text(json.dumps(document))
    try:
        trained_net.load(folder)
    except UserError as error:
        assert "parameter down.bias was saved with shape [6], this net has [5]" in str(error)
        assert "\n" not in str(error)
    else:
        raise AssertionError("loaded")


if __name__ == "__main__":
    checks.run(globals())
