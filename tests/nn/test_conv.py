"""Convolutions, their ReLU and sum in each of their ways against the plain formulation."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle_scale.nn import conv, winograd_tiles, winograd_transforms
from dalle_scale.nn.conv import Conv, convolve


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    if not winograd_transforms.available():
        pytest.skip("no C compiler")
    monkeypatch.setattr(winograd_tiles, "_FEWEST_CHANNELS", 1)
    monkeypatch.setattr(conv, "_FEWEST_PRODUCTS", 1)


def arguments(
    kernel: int, channels: int, outputs: int, bias_of: str = "all", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, weight, bias, residual; maps of 8x12, channels-last."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, channels, 8, 12), (outputs, channels, kernel, kernel)]
    sizes += [(outputs,) if bias_of == "all" else (2, outputs), (2, outputs, 8, 12)]
    tensors = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    return [
        (t.contiguous(memory_format=torch.channels_last) if place in (0, 3) else t).requires_grad_()
        for place, t in enumerate(tensors)
    ]


def plain(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, residual: Tensor | None, gain: float) -> Tensor:
    out = F.conv2d(F.relu(x) if relu else x, weight, padding=weight.shape[2] // 2) + bias[..., None, None]
    return gain * out if residual is None else residual + gain * out


def own_way(y: Tensor) -> bool:
    return y.grad_fn is not None and "_Convolution" in y.grad_fn.name()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(5, 3), (3, 70), (4, 4)])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_values_and_gradients(
    kernel: int, channels: int, outputs: int, relu: bool, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bias_of, with_residual, gain, row_values in itertools.product(
        ("all", "each"), (False, True), (1.0, 0.25), (1, 100, 2**18)
    ):
        monkeypatch.setattr(conv, "_ROW_VALUES", row_values)
        x, weight, bias, residual = arguments(kernel, channels, outputs, bias_of)
        added = residual if with_residual else None
        ours, expected = (f(x, weight, bias, relu, added, gain) for f in (convolve, plain))
        assert own_way(ours) == (kernel == 3 or (kernel == 1 and bias_of == "all"))
        torch.testing.assert_close(ours, expected)
        upstream, asked = torch.randn_like(expected), (x, weight, bias, *((residual,) if with_residual else ()))
        of_ours, of_plain = (torch.autograd.grad(y, asked, upstream) for y in (ours, expected))
        for found, wanted in zip(of_ours, of_plain, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", [1, 3])
def test_against_differences(kernel: int, always: None) -> None:
    x, weight, bias, residual = arguments(kernel, 3, 2)

    def called(*tensors: Tensor) -> Tensor:
        return convolve(*tensors[:3], relu=True, residual=tensors[3], gain=0.5)

    assert torch.autograd.gradcheck(called, (x, weight, bias, residual), fast_mode=True)


@pytest.mark.parametrize("kernel", [1, 3])
def test_only_what_is_asked_for_has_a_gradient(kernel: int, always: None) -> None:
    tensors = arguments(kernel, 4, 3)
    for asked in range(4):
        given = [tensor.detach().requires_grad_(place == asked) for place, tensor in enumerate(tensors)]
        ours, expected = (f(*given[:3], True, given[3], 0.5) for f in (convolve, plain))
        found, wanted = (torch.autograd.grad(y.square().sum(), given[asked])[0] for y in (ours, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_input_alone_is_kept(kernel: int, always: None) -> None:
    """And the weight: neither relu(x) nor what is summed."""
    x, weight, bias, residual = arguments(kernel, 4, 3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        convolve(x, weight, bias, relu=True, residual=residual, gain=0.5)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, weight)}


def chain(convolve: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
    """A 1x1 skip, a branch from 1x1 to 3x3 and back, then a 3x3 convolution: most inputs come out of a 1x1 one."""
    t = tensors
    skip = convolve(t["x"], t["skip"], t["bias"], False, None, 1.0)
    inner = convolve(t["x"], t["down"], t["bias"], True, None, 1.0)
    branch = convolve(inner, t["middle"], t["bias"], True, None, 1.0)
    out = convolve(branch, t["up"], t["bias"], True, skip, 0.25)
    return convolve(out, t["last"], t["bias"], True, out, 0.5)


def chain_tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(2, 4, 8, 12, generator=rng).contiguous(memory_format=torch.channels_last)}
    for name, kernel in (("skip", 1), ("down", 1), ("middle", 3), ("up", 1), ("last", 3)):
        tensors[name] = torch.randn(4, 4, kernel, kernel, generator=rng)
    tensors["bias"] = torch.randn(4, generator=rng)
    return {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}


def test_what_came_out_of_1x1_is_made_again(always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits; only maps that nothing else makes again are kept: x, and what comes out of `middle`."""
    tensors, kept = chain_tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out = chain(convolve, tensors)
    maps = {t.untyped_storage().data_ptr() for t in kept if t.shape == out.shape}
    assert len(maps) == 2 and tensors["x"].untyped_storage().data_ptr() in maps
    ours = torch.autograd.grad(out.square().sum(), list(tensors.values()))
    expected = torch.autograd.grad(chain(plain, tensors).square().sum(), list(tensors.values()))
    torch.testing.assert_close(ours, expected)
    monkeypatch.setattr(conv, "_origin", lambda x: None)
    kept_all = torch.autograd.grad(chain(convolve, tensors).square().sum(), list(tensors.values()))
    assert all(torch.equal(*pair) for pair in zip(ours, kept_all, strict=True))


def test_what_was_changed_in_place_is_kept(always: None) -> None:
    def changed(convolve: Callable[..., Tensor], t: dict[str, Tensor]) -> Tensor:
        inner = convolve(t["x"], t["down"], t["bias"], False, None, 1.0)
        return convolve(inner.mul_(-3), t["middle"], t["bias"], True, None, 1.0)

    tensors = chain_tensors()
    asked = [tensors[name] for name in ("x", "down", "middle")]
    found = [torch.autograd.grad(changed(f, tensors).square().sum(), asked) for f in (convolve, plain)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", ["x", "down", "bias", "first"])
def test_what_a_map_was_made_of_may_change(name: str, frozen: bool, always: None) -> None:
    """Between two convolutions: the second still has the gradient of the map that it was given."""
    tensors = chain_tensors()
    tensors["first"] = torch.randn_like(tensors["down"]).requires_grad_()
    for tensor in tensors.values():
        tensor.requires_grad_(not frozen)
    tensors["middle"].requires_grad_()
    given = {key: tensor.detach().clone() for key, tensor in tensors.items()}

    def changed(convolve: Callable[..., Tensor]) -> Tensor:
        inner = convolve(convolve(tensors["x"], tensors["first"], tensors["bias"], False, None, 1.0),
                         tensors["down"], tensors["bias"], True, tensors["x"], 1.0)  # fmt: skip
        with torch.no_grad():
            tensors[name].mul_(-3)
        return convolve(inner, tensors["middle"], given["bias"], True, None, 1.0)

    found = []
    for function in (convolve, plain):
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(given[key])
        found.append(torch.autograd.grad(changed(function).square().sum(), tensors["middle"]))
    torch.testing.assert_close(*found)


NOT_OURS = {  # argument -> one that torch adds or refuses
    "double bias": (2, lambda bias, residual: bias.double()),
    "bias of one": (2, lambda bias, residual: bias[:1]),
    "bias of other samples": (2, lambda bias, residual: bias.expand(3, -1)),
    "double residual": (4, lambda bias, residual: residual.double()),
    "half residual": (4, lambda bias, residual: residual.bfloat16()),
    "residual of one sample": (4, lambda bias, residual: residual[:1]),
    "residual of one position": (4, lambda bias, residual: residual[:, :, :1, :1]),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", NOT_OURS)
def test_what_does_not_fit_is_not_ours(case: str, kernel: int, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code would read beyond its end, or other numbers."""
    x, weight, bias, residual = (t.detach() for t in arguments(kernel, 4, 5, dtype=torch.float32))
    given: list[Any] = [x, weight, bias, False, residual, 0.5]
    place, change = NOT_OURS[case]
    given[place] = change(bias, residual)
    found = []
    for fewest in (1, 2**60):
        monkeypatch.setattr(conv, "_FEWEST_PRODUCTS", fewest)
        try:
            found.append(convolve(*given))
        except RuntimeError as error:
            found.append(str(error))
    assert type(found[0]) is type(found[1])
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [1, 3])
def test_backwards_within_autocast(layer: int, always: None) -> None:
    x, weight, bias, residual = arguments(layer, 4, 5, dtype=torch.float32)
    y = convolve(x, weight, bias, True, residual, 0.5).square().sum()
    expected = torch.autograd.grad(y, (x, weight, bias, residual), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, (x, weight, bias, residual))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_result_is_saved_without_what_it_was_made_of(always: None) -> None:
    x, weight, bias, residual = arguments(1, 4, 5)
    y = convolve(x, weight, bias, False, residual)
    file = io.BytesIO()
    torch.save(y.detach(), file)
    torch.save(y, whole := io.BytesIO())
    assert whole.tell() - file.tell() < 1000
    whole.seek(0)
    assert torch.equal(torch.load(whole), y)


def test_arguments_of_inference(always: None) -> None:
    """As in torch: a residual is only added."""
    x, weight, bias, _ = arguments(1, 4, 5)
    with torch.inference_mode():
        residual = arguments(1, 4, 5)[3].detach().clone()
    y = convolve(x, weight, bias, False, residual)
    torch.testing.assert_close(y, plain(x, weight, bias, False, residual, 1.0))
    y.sum().backward()


def test_what_is_left_to_torch(always: None) -> None:
    x, weight, bias, _ = arguments(1, 4, 3, dtype=torch.float32)
    assert own_way(convolve(x, weight, bias))
    assert not own_way(convolve(x.contiguous(), weight, bias))  # planes
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, weight, bias).dtype == torch.bfloat16
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    out = convolve(*halves, relu=True)
    assert not own_way(out) and out.dtype == torch.bfloat16


def test_a_layer_is_a_convolution() -> None:
    layer = Conv(4, 3, 3)
    assert isinstance(layer, torch.nn.Conv2d) and list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(layer(x), torch.nn.Conv2d.forward(layer, x))


@pytest.mark.parametrize("kernel", [1, 3])
def test_results_may_be_changed_in_place(kernel: int, always: None) -> None:
    x, weight, bias, _ = arguments(kernel, 4, 3)
    results = [
        torch.autograd.grad(f(x, weight, bias, False, None, 1.0).relu_().sum(), weight) for f in (convolve, plain)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("kernel", "shape", "outputs", "taken"),
    [
        (3, (1, 92, 128, 128), 23, True),
        (1, (1, 92, 128, 128), 23, True),
        (3, (1, 92, 64, 64), 23, False),  # little work
        (1, (1, 92, 64, 64), 23, False),
        (3, (1, 92, 128, 130), 23, False),  # not of tiles
        (3, (1, 192, 128, 128), 16, False),  # few channels
        (7, (1, 92, 128, 128), 23, False),
    ],
)
def test_where_its_own_way_is_taken(
    kernel: int, shape: tuple[int, ...], outputs: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nowhere without a compiler."""
    x = torch.empty(shape, memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.empty(outputs, shape[1], kernel, kernel, dtype=dtype)
        given = x.to(dtype), weight, torch.empty(outputs, dtype=dtype), None
        for compiler in (True, False):
            monkeypatch.setattr(winograd_transforms, "available", lambda compiler=compiler: compiler)
            assert conv._has_own_way(*given) == (taken and dtype == torch.float32 and compiler)
