"""What stays in fp32 where weights are bf16, as an engine of 16 bits has them, found by watching every operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.contract import NAMES, build, fake_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_scale.nn.lpips import PerceptualConfig, build_lpips

ATEN = torch.ops.aten
# Probabilities, likelihoods, distances, counts: where they see 16 bits, codes stay unused and losses are wrong
ISLANDS = {
    *(ATEN._softmax, ATEN._log_softmax, ATEN.logsumexp, ATEN.log, ATEN.log1p, ATEN.exp, ATEN.expm1),
    *(ATEN.argmin, ATEN.argmax, ATEN.min, ATEN.index_add_, ATEN.index_add, ATEN.scatter_add_, ATEN.bincount),
    *(ATEN.pow, ATEN.special_log_ndtr, ATEN.softplus, ATEN.mse_loss, ATEN.var),
}


class Watch(TorchDispatchMode):
    """Collects the operations of ISLANDS that were given numbers of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.short: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in ISLANDS:
            self.seen.add(str(packet))
            given = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
            if any(x.dtype.itemsize == 2 for x in given):
                self.short.append(f"{packet} of {[list(x.shape) for x in given]}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_stage(name: str) -> None:
    stage, nets = build(name)
    for net in nets.values():
        for parameter in net.parameters():
            parameter.data = parameter.data.bfloat16()
    buffers = {key: buffer.dtype for net in nets.values() for key, buffer in net.named_buffers()}
    batch = fake_batch(stage.inputs, 4)
    for net_name in stage.nets_to_update(3):
        with Watch() as watch:
            losses = stage.loss(net_name, nets, batch, 3)
        # open_clip's own: attention's softmax, which is fp32 inside, and exp of the scale, a weight of 16 bits here
        others = ("aten._softmax", "aten._safe_softmax", "aten.exp of [[1]]") if name == "clip" else ()
        left = [found for found in watch.short if not found.startswith(others or "-")]
        assert not left, left
        assert losses.total.dtype == torch.float32 and all(t.dtype == torch.float32 for t in losses.terms.values())
        assert watch.seen, "this test watches nothing of the stage"
        losses.total.backward()
    stage.after_step(nets, 3)
    assert buffers == {key: buffer.dtype for net in nets.values() for key, buffer in net.named_buffers()}
    assert not any(dtype.itemsize == 2 for dtype in buffers.values() if dtype.is_floating_point)


def test_the_watch_sees() -> None:
    with Watch() as watch:
        torch.randn(3).bfloat16().softmax(0)
    assert len(watch.short) == 1


def test_ruler_of_images() -> None:
    """LPIPS of 16-bit images is that of the same numbers in fp32, within autocast too."""
    ruler = build_lpips(PerceptualConfig(kind="random"))
    images = (2 * torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1).bfloat16()
    want = ruler(*images.float())
    got = ruler(*images)
    assert got.dtype == torch.float32 and torch.equal(got, want)
