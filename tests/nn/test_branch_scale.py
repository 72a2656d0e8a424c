"""Gradient scales of residual branches against the same net in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dalle_scale.models.transformer.model import Transformer
from dalle_scale.nn.residual_scaling import BranchScale, branches_of

SIZES = {"text_vocab": 11, "text_length": 5, "image_vocab": 13, "grid": 3, "width": 32, "heads": 2, "conv_kernel": 3}


def net_of(dtype: torch.dtype, scales: list[float]) -> Transformer:
    torch.manual_seed(0)
    net = Transformer(**SIZES, kinds=("row", "conv"))
    for (scale, parameters), value in zip(branches_of(net), scales, strict=True):
        scale.value = value
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype) if parameter.ndim > 1 else parameter.data
    return net


def gradients(net: Transformer, factor: float = 1.0) -> dict[str, Tensor]:
    """Of `factor` times a loss, fp32, what scales multiplied undone."""
    generator = torch.Generator().manual_seed(1)
    text, codes = torch.randint(0, 11, (4, 5), generator=generator), torch.randint(0, 13, (4, 9), generator=generator)
    logits = net(text, codes)[1]
    assert logits.dtype == torch.float32
    (nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()) * factor).backward()
    divisor = {p: scale.value for scale, parameters in branches_of(net) for p in parameters}
    return {name: p.grad.double() / divisor.get(p, 1) for name, p in net.named_parameters() if p.grad is not None}


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest error relative to the norm; key biases have no gradient but rounding errors."""
    assert got.keys() == want.keys()
    names = [name for name in want if "key.bias" not in name]
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in names)


def test_scales_change_nothing_but_rounding():
    want = gradients(net_of(torch.float32, [1.0] * 4))
    assert distance(gradients(net_of(torch.float32, [3.0, 2.0**13, 0.1, 1e6])), want) < 1e-5
    assert distance(gradients(net_of(torch.float16, [2.0**10] * 4)), want) < 0.01


def test_scales_keep_gradients_that_fp16_loses():
    factor = 2.0**-22
    want = gradients(net_of(torch.float32, [1.0] * 4), factor)
    assert distance(gradients(net_of(torch.float16, [1.0] * 4), factor), want) > 0.9
    assert distance(gradients(net_of(torch.float16, [2.0**24] * 4), factor), want) < 0.02


def test_an_overflow_stays_in_its_branch():
    """The last branch overflows; those before it see the gradient of the identity path, whole and finite."""
    net = net_of(torch.float16, [2.0**10] * 3 + [2.0**40])
    broken = {name for name, gradient in gradients(net).items() if not gradient.isfinite().all()}
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert broken and broken <= {names[id(parameter)] for parameter in branches_of(net)[-1][1]}
    for name, parameter in net.named_parameters():
        assert name in broken or parameter.grad is None or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("value", [1.0, 64.0])
def test_a_branch_in_closed_form(value):
    """x + (w * x)^2 with the branch in fp16: the gradient of x is 1 + 2 w^2 x, that of w scaled by `value`."""
    scale = BranchScale()
    scale.value = value
    x = torch.tensor([1.5, -0.25], requires_grad=True)
    w = torch.tensor([0.5, 2.0], dtype=torch.float16, requires_grad=True)
    out = scale.leave((w * scale.enter(x).half()) ** 2, x)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert torch.equal(x.grad, 1 + 2 * w.detach().float() ** 2 * x.detach())
    assert torch.equal(w.grad.float(), value * 2 * w.detach().float() * x.detach() ** 2)


def test_the_identity_path_stays_fp32():
    seen = []
    net = net_of(torch.float16, [4.0] * 4)
    net.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    gradients(net)
    assert seen == [torch.float32]
    assert {p.dtype for p in net.parameters() if p.ndim < 2} == {torch.float32}
    assert branches_of(nn.Linear(2, 2)) == []
