"""PatchGAN: what a logit sees, independence of the batch; its losses and LeCam against the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from dalle_scale import config as run_config
from dalle_scale.nn.patchgan import (
    DiscriminatorConfig,
    MovingAverage,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    lecam,
)
from dalle_scale.types import UserError


def make(**values: object) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(run_config.parse(DiscriminatorConfig, values, "test"))


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field(layers: int, pixels: int) -> None:
    """The middle logit depends on exactly so many pixels a side, by its gradient; all weights positive, so that
    nothing cancels."""
    net = make(width=2, layers=layers, norm="none")
    for parameter in net.parameters():
        parameter.data.abs_()
    images = torch.ones(1, 3, 160, 160, requires_grad=True)
    logits = net(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, middle, middle], images)
    rows, columns = gradient[0].abs().sum(dim=0).nonzero(as_tuple=True)
    for seen in (rows, columns):
        assert seen.max() - seen.min() + 1 == pixels
    assert len(rows) == pixels**2


def test_paper_sizes() -> None:
    """By hand: 4x4 kernels 3-64-128-256-512-1 with biases, a gain and a bias a channel for the three norms."""
    net = PatchDiscriminator(DiscriminatorConfig())
    weights = (
        16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + (64 + 128 + 256 + 512 + 1) + 2 * (128 + 256 + 512)
    )
    assert sum(p.numel() for p in net.parameters()) == weights
    with torch.device("meta"):
        assert PatchDiscriminator(DiscriminatorConfig())(torch.empty(2, 3, 256, 256)).shape == (2, 30, 30)
    assert float(net.head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_image_is_judged_alone(norm: str, mode: bool) -> None:
    net = make(width=8, layers=2, norm=norm, norm_groups=4).train(mode)
    images = torch.randn(3, 3, 24, 24)
    together = net(images)
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], net(images[index : index + 1]), rtol=1e-4, atol=1e-6)
    assert not list(net.buffers())


def test_smallest_image() -> None:
    for layers in (1, 2, 3):
        config = DiscriminatorConfig(width=4, layers=layers, norm="none")
        net, side = PatchDiscriminator(config), config.smallest_pixels
        assert net(torch.zeros(1, 3, side, side)).shape == (1, 1, 1)
        with pytest.raises(RuntimeError):
            net(torch.zeros(1, 3, side - 1, side - 1))


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([[[2.0, 0.5]], [[-1.0, 1.0]]]), torch.tensor([[[-3.0, 0.0]], [[1.0, -0.5]]])
    want = [((0 + 0.5) / 2 + (0 + 1) / 2) / 2, ((2 + 0) / 2 + (2 + 0.5) / 2) / 2]
    assert discriminator_loss(real, fake, "hinge").tolist() == pytest.approx(want)
    assert generator_loss(fake, "hinge").tolist() == pytest.approx([1.5, -0.25])


def test_non_saturating_is_binary_cross_entropy() -> None:
    logits = torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    assert generator_loss(logits, "non_saturating").tolist() == pytest.approx([3.0486, 0.6931, 0.0486], abs=1e-4)
    real, fake = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    p_real, p_fake = real.double().sigmoid(), fake.double().sigmoid()
    want = (-(p_real.log()) - (1 - p_fake).log()).mean(dim=(1, 2)) / 2
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating").double(), want, rtol=1e-5, atol=0)
    assert generator_loss(torch.full((1, 1, 1), -1e4), "non_saturating").item() == 1e4  # no overflow


def test_lecam_by_hand() -> None:
    """Real logits are drawn to the average of made ones, and the reverse."""
    real, fake = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[-1.0, 0.0]]])
    want = ((1 - -2) ** 2 + (3 - -2) ** 2) / 2 + ((-1 - 0.5) ** 2 + (0 - 0.5) ** 2) / 2
    assert lecam(real, fake, torch.tensor(0.5), torch.tensor(-2.0)).item() == pytest.approx(want)
    assert lecam(torch.full((1, 2, 2), -2.0), torch.full((1, 2, 2), 0.5), *torch.tensor([0.5, -2.0])).item() == 0


def test_moving_average_has_no_bias_to_its_start() -> None:
    average = MovingAverage(2, decay=0.9)
    assert average.value().tolist() == [0, 0] and average.started().item() == 0
    values = torch.randn(30, 2)
    for count, value in enumerate(values, start=1):
        average.update(value)
        shares = torch.tensor([0.9 ** (count - 1 - index) for index in range(count)])
        want = (shares[:, None] * values[:count]).sum(dim=0) / shares.sum()
        torch.testing.assert_close(average.value(), want, rtol=1e-4, atol=1e-6)
    assert average.started().item() == 1
    assert set(average.state_dict()) == {"sums", "mass"}
    last = MovingAverage(2, decay=0.0)
    for value in values:
        last.update(value)
    assert torch.equal(last.value(), values[-1])


def test_bad_values_get_one_clear_line() -> None:
    with pytest.raises(UserError, match="norm_groups 32 must divide 2 x width = 48") as caught:
        make(width=24)
    assert "\n" not in str(caught.value)
    assert math.isfinite(make(width=24, norm="none")(torch.zeros(1, 3, 24, 24)).sum().item())
