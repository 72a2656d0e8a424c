"""Every stage keeps the contract of dalle_scale/types.py. A new stage is found by its file and its tiny config."""

import copy
from contextlib import nullcontext

import pytest
import torch
from support.contract import NAMES, TINY, build, fake_batch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_scale import config
from dalle_scale.types import Batch, Losses, StrictModel

ATEN = torch.ops.aten
HOST_READS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN._unique2, ATEN.unique_dim}
BATCH_DEPENDENT = {"clip"}  # a contrastive loss compares the samples of a batch


def rows(batch: Batch, part: slice) -> Batch:
    return {key: value[part] for key, value in batch.items()}


def test_every_stage_has_a_tiny_config():
    assert {path.stem for path in TINY.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_describes_itself(name):
    stage, nets = build(name)
    assert issubclass(stage.Config, StrictModel)
    assert stage.inputs.keys
    assert set(config.load(TINY / f"{name}.yaml").optim) == set(nets)
    assert set(stage.nets_to_update(0)) <= set(nets)
    assert stage.flops_per_sample() > 0


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_reported_and_reaches_every_parameter(name):
    stage, nets = build(name)
    batch = fake_batch(stage.inputs, 4)
    before = copy.deepcopy(batch)
    for net_name in stage.nets_to_update(0):
        losses = stage.loss(net_name, nets, batch, step=3)
        assert isinstance(losses, Losses) and losses.total.shape == () and losses.total.isfinite()
        assert losses.terms and not any(term.requires_grad for term in losses.terms.values())
        losses.total.backward()
        missing = [key for key, parameter in nets[net_name].named_parameters() if parameter.grad is None]
        assert not missing, f"no gradient: {missing}"
    assert all(torch.equal(batch[key], before[key]) for key in batch), "the batch was changed in place"


@pytest.mark.parametrize("name", NAMES)
def test_same_batch_same_loss(name):
    stage, nets = build(name)
    batch = fake_batch(stage.inputs, 4)
    torch.manual_seed(1)
    first = stage.loss("model", nets, batch, step=3).total
    torch.manual_seed(2)
    assert torch.equal(first, stage.loss("model", nets, batch, step=3).total), "noise must come from batch['seed']"


@pytest.mark.parametrize("name", sorted(set(NAMES) - BATCH_DEPENDENT))
def test_loss_of_a_batch_is_the_mean_of_its_halves(name):
    stage, nets = build(name)
    batch = fake_batch(stage.inputs, 6)
    whole = stage.loss("model", nets, batch, step=3)
    halves = [stage.loss("model", nets, rows(batch, part), step=3) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(whole.total, (halves[0].total + halves[1].total) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_slot_changes_nothing(name):
    stage, nets = build(name)
    batch = fake_batch(stage.inputs, 4)
    kept = rows(batch, slice(3))
    batch["weight"] = torch.tensor([4 / 3, 4 / 3, 4 / 3, 0.0])
    with_slot = stage.loss("model", nets, batch, step=3).total
    torch.testing.assert_close(with_slot, stage.loss("model", nets, kept, step=3).total, rtol=1e-5, atol=1e-6)


class NoHostReads(TorchDispatchMode):
    """Refuses the operations by which a program waits for its GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in HOST_READS, f"{func}: the host waits for a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_an_update_does_not_wait_for_its_numbers(name):
    """From the second on; the first may initialize."""
    stage, nets = build(name)
    for net in nets.values():
        net.train()
    for step in range(2):
        with NoHostReads() if step else nullcontext():
            for net_name in stage.nets_to_update(step):
                stage.loss(net_name, nets, fake_batch(stage.inputs, 4, seed=step), step).total.backward()
            stage.after_step(nets, step)


def test_waiting_would_be_seen():
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        torch.ones(3).sum().item()
