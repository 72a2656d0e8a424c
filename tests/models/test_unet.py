"""The UNet of DDPM: parameters of the published models, every part against a plain reference, dropout, captions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_scale.models.unet.layers import Attention, Double, Dropout, Halve, NormSwish, ResBlock
from dalle_scale.models.unet.model import UNet, time_embedding
from dalle_scale.nn import winograd

CIFAR10 = {"size": 32, "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention_sizes": (16,)}
LSUN = {"size": 256, "width": 128, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "attention_sizes": (16,)}
TINY = {"n_in": 3, "n_out": 3, "size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention_sizes": (4,)}


def randomised(net: nn.Module) -> nn.Module:
    """Weights without zeros: what starts at zero would hide everything before it."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.3)
    return net


def make(**changes: Any) -> UNet:
    torch.manual_seed(0)
    net = randomised(UNet(**{**TINY, **changes}))
    assert isinstance(net, UNet)
    return net


def by_hand(shape: dict[str, Any]) -> int:
    """Parameters of the paper's UNet for 3 channels, written down layer by layer."""

    def conv(n_in: int, n_out: int, kernel: int) -> int:
        return n_in * n_out * kernel**2 + n_out

    def block(n_in: int, n_out: int) -> int:
        norms = 2 * n_in + 2 * n_out
        shortcut = conv(n_in, n_out, 1) if n_in != n_out else 0
        return norms + conv(n_in, n_out, 3) + conv(n_out, n_out, 3) + (4 * width + 1) * n_out + shortcut

    def attention(n: int) -> int:
        return 2 * n + 4 * conv(n, n, 1)

    width, sides = shape["width"], len(shape["multipliers"])
    widths = [width * multiplier for multiplier in shape["multipliers"]]
    attends = [shape["size"] // 2**level in shape["attention_sizes"] for level in range(sides)]
    total = (width + 1) * 4 * width + (4 * width + 1) * 4 * width + conv(3, width, 3)
    stack, n = [width], width
    for level in range(sides):
        for _ in range(shape["blocks"]):
            total += block(n, widths[level]) + attends[level] * attention(widths[level])
            n = widths[level]
            stack.append(n)
        if level + 1 < sides:
            total += conv(n, n, 3)
            stack.append(n)
    total += 2 * block(n, n) + attention(n)
    for level in reversed(range(sides)):
        for _ in range(shape["blocks"] + 1):
            total += block(n + stack.pop(), widths[level]) + attends[level] * attention(widths[level])
            n = widths[level]
        total += conv(n, n, 3) if level else 0
    assert not stack
    return total + 2 * n + conv(n, 3, 3)


@pytest.mark.parametrize(("shape", "published"), [(CIFAR10, 35_746_307), (LSUN, 113_673_219)])
def test_parameters_of_the_published_models(shape: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        net = UNet(n_in=3, n_out=3, **shape)
    assert sum(parameter.numel() for parameter in net.parameters()) == published == by_hand(shape)


def test_time_embedding_is_that_of_the_paper() -> None:
    times = torch.tensor([0, 1, 7, 999])
    found = time_embedding(times, 8)
    for row, time in enumerate(times.tolist()):
        angles = [time * 10_000 ** (-index / 3) for index in range(4)]  # 4 frequencies, from 1 to 1 / 10,000
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_norm_and_swish_with_gradients() -> None:
    torch.manual_seed(0)
    part = NormSwish(64, 16).double()
    nn.init.normal_(part.weight), nn.init.normal_(part.bias)
    x = (3 * torch.randn(2, 64, 3, 2, dtype=torch.float64) + 1).requires_grad_()
    plain = F.silu(F.group_norm(x, 16, part.weight, part.bias, eps=1e-6))
    ours = part(x)
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(ours)
    wanted = (x, part.weight, part.bias)
    for ours_grad, plain_grad in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-5, atol=1e-5)  # scales are made in fp32
    assert torch.autograd.gradcheck(part, (x,), fast_mode=True)


def test_norm_and_swish_in_bfloat16() -> None:
    torch.manual_seed(0)
    part, x = NormSwish(64, 16), torch.randn(2, 64, 4, 4)
    exact = x.clone().requires_grad_()
    part(exact).square().sum().backward()
    rounded = x.bfloat16().requires_grad_()
    part.bfloat16()(rounded).square().sum().backward()
    assert rounded.grad is not None and rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad.float(), exact.grad, rtol=0.05, atol=0.05)


def test_doubling_is_upsampling_and_convolution() -> None:
    part = Double(32, 32).double()
    nn.init.normal_(part.bias)
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), part.weight, part.bias, padding=1)
    ours = part(x)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    wanted = (x, part.weight, part.bias)
    for ours_grad, plain_grad in zip(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-5, atol=1e-5)


def test_halving_pads_right_and_below() -> None:
    part = Halve(32)
    x = torch.randn(1, 32, 4, 6)
    found = part(x)
    assert found.shape == (1, 32, 2, 3)
    padded = torch.zeros(32, 5, 7)
    padded[:, :4, :6] = x[0]
    for row in range(2):
        for column in range(3):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected = (part.conv.weight * window).sum(dim=(1, 2, 3)) + part.conv.bias
            torch.testing.assert_close(found[0, :, row, column], expected, rtol=1e-4, atol=1e-5)


def plain_block(block: ResBlock, x: Tensor, shift: Tensor) -> Tensor:
    y = F.conv2d(plain_norm(block.norm1, x, swish=True), block.conv1.weight, block.conv1.bias, padding=1)
    y = plain_norm(block.norm2, y + shift[:, :, None, None], swish=True)
    y = F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1)
    return y + (x if block.skip is None else F.conv2d(x, block.skip.weight, block.skip.bias))


def plain_norm(part: nn.Module, x: Tensor, swish: bool) -> Tensor:
    groups = x.reshape(len(x), 4, -1)
    centred = groups - groups.mean(dim=2, keepdim=True)
    y = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    y = y * part.weight[:, None, None] + part.bias[:, None, None]
    return y * torch.sigmoid(y) if swish else y


def plain_attention(part: Attention, x: Tensor) -> Tensor:
    count, width = x.shape[:2]
    rows = plain_norm(part.norm, x, swish=False).reshape(count, width, -1).transpose(1, 2)
    weights = zip(part.query_key_value.weight.chunk(3), part.query_key_value.bias.chunk(3), strict=True)
    query, key, value = (rows @ weight.T + bias for weight, bias in weights)
    shares = torch.softmax(query @ key.transpose(1, 2) * width**-0.5, dim=-1)
    mixed = shares @ value @ part.output.weight.T + part.output.bias
    return x + mixed.transpose(1, 2).reshape(x.shape)


def plain_unet(net: UNet, x: Tensor, times: Tensor) -> Tensor:
    """The two sides of TINY (one block each, attention at the lower one), written down."""
    time = time_embedding(times, 16).to(x.dtype) @ net.time1.weight.T + net.time1.bias
    time = F.silu(F.silu(time) @ net.time2.weight.T + net.time2.bias)
    shifts = (time @ net.time_of_block.weight.T + net.time_of_block.bias).split([16, 32, 32, 32, 32, 32, 16, 16], dim=1)
    full, half, (middle, last_middle) = net.down[0], net.down[2], net.middle
    a = F.conv2d(x, net.input.weight, net.input.bias, padding=1)
    b = plain_block(full[0], a, shifts[0])
    c = net.down[1](b)
    d = plain_attention(half[1], plain_block(half[0], c, shifts[1]))
    y = plain_attention(middle[1], plain_block(middle[0], d, shifts[2]))
    y = plain_block(last_middle[0], y, shifts[3])
    for unit, skip, shift in ((net.up[0], d, shifts[4]), (net.up[1], c, shifts[5])):
        y = plain_attention(unit[1], plain_block(unit[0], torch.cat([y, skip], dim=1), shift))
    y = net.up[2](y)
    for unit, skip, shift in ((net.up[3], b, shifts[6]), (net.up[4], a, shifts[7])):
        [block] = unit
        y = plain_block(block, torch.cat([y, skip], dim=1), shift)
    return F.conv2d(plain_norm(net.norm, y, swish=True), net.output.weight, net.output.bias, padding=1)


@pytest.mark.parametrize("by_winograd", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_against_a_plain_net(recompute: bool, by_winograd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_winograd:  # which takes larger nets by itself
        monkeypatch.setattr(winograd, "_FEWEST_TILES", 1)
        monkeypatch.setattr(winograd, "_FEWEST_CHANNELS", 1)
    net, plain = make().double(), make().double()
    for module in net.modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = recompute
    x, times = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 5, 900])
    images = x.contiguous(memory_format=torch.channels_last)
    ours, expected = net(images, times), plain_unet(plain, x, times)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)  # the net answers in fp32
    upstream = torch.randn_like(expected)
    (ours * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for (name, ours_parameter), parameter in zip(net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_parameter.grad, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_starts_as_its_residual_paths() -> None:
    torch.manual_seed(0)
    net = UNet(**TINY)
    x = torch.randn(2, 3, 8, 8)
    assert not net(x, torch.tensor([3, 4])).any()
    block, attention = ResBlock(0, 32, 32, 8), Attention(32, 8)
    y = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(y, torch.randn(2, 32), None), y) and torch.equal(attention(y), y)
    # "fan_avg": variance 1 / mean of inputs and outputs, each of the joined layers for itself
    for weight, fans in ((block.conv1.weight, 2 * 32 * 9), (attention.query_key_value.weight, 2 * 32)):
        bound = math.sqrt(6 / fans)
        assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
    assert not any(bias.any() for name, bias in net.named_parameters() if name.endswith("bias") and "norm" not in name)


def test_every_pixel_sees_every_pixel() -> None:
    net = make()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    for row, column in ((0, 0), (7, 7), (3, 4)):
        [grad] = torch.autograd.grad(net(x, torch.tensor([10]))[0, :, row, column].sum(), x)
        assert (grad.abs().amax(dim=1) > 0).all()


def kept(seeds: Tensor, step: int = 3, share: float = 0.1, blocks: int = 4) -> Tensor:
    """bool [B, blocks, 32 x 8 x 8]."""
    dropout = Dropout.of(share, seeds, step, blocks, 32 * 64)
    x = torch.zeros(len(seeds), 32, 8, 8)
    return torch.stack([dropout.kept(x, block).flatten(1) for block in range(blocks)], dim=1)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_is_independent_and_drops_its_share(share: float) -> None:
    seeds = torch.randint(1 << 62, (64,), generator=torch.Generator().manual_seed(0))
    masks = kept(seeds, share=share)
    dropped = 1 - masks.double().mean(dim=2)
    spread = math.sqrt(share * (1 - share) / masks.shape[2])
    assert float((dropped - share).abs().max()) < 5 * spread and float((dropped - share).std()) < 1.2 * spread
    assert abs(float(dropped.mean()) - share) < 4 * spread / 16
    # between samples, blocks, steps, and places that lie next to each other
    centred = masks.double() - (1 - share)
    pairs = [(centred, kept(seeds, step=4, share=share).double() - (1 - share)), (centred[:, 0], centred[:, 1])]
    pairs += [(centred[0], centred[1]), (centred[:-1], centred[1:]), (centred[..., :-1], centred[..., 1:])]
    for first, second in pairs:
        correlation = float((first * second).mean()) / (share * (1 - share))
        assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_dropout_of_a_sample_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([5, 1 << 40, 9])
    assert torch.equal(kept(seeds)[1:], kept(seeds[1:]))
    net = make(dropout=0.5)
    x, times = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 3])
    whole = net(x, times, seeds=seeds, step=2)
    torch.testing.assert_close(whole[1:], net(x[1:], times[1:], seeds=seeds[1:], step=2))
    assert not torch.allclose(whole, net(x, times, seeds=seeds, step=3))
    assert not torch.allclose(whole, net(x, times))
    net.eval()
    assert torch.equal(net(x, times, seeds=seeds, step=2), net(x, times))


def test_dropout_scales_up_what_is_left() -> None:
    torch.manual_seed(0)
    block = randomised(ResBlock(0, 32, 32, 8))
    x, time, seeds = torch.randn(1, 32, 4, 4), torch.randn(1, 32), torch.arange(4000)
    dropout = Dropout.of(0.25, seeds, 0, 1, 32 * 16)
    with torch.no_grad():
        without = block(x, time, None)
        found = block(x.expand(4000, -1, -1, -1), time.expand(4000, -1), dropout)
        error = (found - without).abs()
    assert float((found.mean(dim=0) - without[0]).abs().max()) < 5 * float(error.max()) / math.sqrt(4000)
    # one sample by hand
    y = block.conv1(block.norm1(x)) + time[:, :, None, None]
    y = block.norm2(y) * Dropout.of(0.25, seeds[:1], 0, 1, 32 * 16).kept(x, 0) / 0.75
    expected = x + F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(found[:1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [4, 8, 16, 128])
def test_blocks_of_narrow_nets_hear_of_the_time(width: int) -> None:
    """A norm with a group for each channel would take away what is added to a channel."""
    torch.manual_seed(0)
    net = UNet(**{**TINY, "width": width, "attention_sizes": ()})
    block = randomised(net.down[0][0])
    x, times = torch.randn(1, width, 8, 8), torch.randn(2, 1, width)
    assert float((block(x, times[0], None) - block(x, times[1], None)).detach().abs().max()) > 0.01


def test_captions() -> None:
    net = make(text_vocab=50, text_length=4)
    x, times = torch.randn(2, 3, 8, 8), torch.tensor([3, 3])
    empty = torch.arange(50, 54).expand(2, -1)
    texts = torch.tensor([[1, 2, 3, 53], [7, 51, 52, 53]])
    unconditional, conditional = net(x, times, empty), net(x, times, texts)
    without = make()
    without.load_state_dict({key: value for key, value in net.state_dict().items() if not key.startswith("caption.")})
    torch.testing.assert_close(unconditional, without(x, times))  # the empty caption adds nothing
    assert all(not torch.allclose(conditional[row], unconditional[row]) for row in range(2))
