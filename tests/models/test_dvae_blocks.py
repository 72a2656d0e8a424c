"""The residual nets against a plain functional transcription of the published architecture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_scale.models.dvae import Bottleneck, CodeEmbedding, Decoder, Encoder
from dalle_scale.nn import conv
from dalle_scale.nn.blocks import Halve

PAPER = (256, 512, 1024, 2048)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_size_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        encoder = Encoder(PAPER, 2, vocab=8192, downsampling=8, stem="resnet")
        decoder = Decoder(PAPER, 2, vocab=8192, n_init=128, channels=6, downsampling=8, stem="resnet")
        logits = encoder(torch.empty(1, 3, 256, 256))
        maps = decoder(logits)
    assert round(count(encoder) / 1e6, 2) == 53.79
    assert round(count(decoder) / 1e6, 2) == 43.83
    assert logits.shape == (1, 32, 32, 8192)
    assert maps.shape == (1, 6, 256, 256)


class Weights:
    """Hands out (weight, bias) pairs of a module in the order of construction."""

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict()
        self.named = {name[: -len(".weight")]: name for name in state if name.endswith(".weight")}
        self.state = state

    def __call__(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[name + ".weight"], self.state[name + ".bias"]


def reference_block(x: Tensor, get: Weights, name: str, kernels: tuple[int, ...], gain: float) -> Tensor:
    """relu-conv four times on the branch; the skip is a 1x1 convolution only where the width changes."""
    branch = x
    for index, kernel in enumerate(kernels):
        branch = F.conv2d(F.relu(branch), *get(f"{name}.branch.{2 * index + 1}"), padding=(kernel - 1) // 2)
    skip = F.conv2d(x, *get(f"{name}.skip")) if f"{name}.skip" in get.named else x
    return skip + gain * branch


def test_encoder_is_the_published_one() -> None:
    torch.manual_seed(0)
    encoder = Encoder((8, 16), 2, vocab=11, downsampling=2, stem="resnet")
    x = torch.randn(2, 3, 8, 8)
    get, kernels, gain = Weights(encoder), (3, 3, 3, 1), 1 / 4**2
    y = F.conv2d(x, *get("input"), padding=3)
    y = reference_block(y, get, "trunk.0", kernels, gain)
    y = reference_block(y, get, "trunk.1", kernels, gain)
    y = F.max_pool2d(y, 2)
    y = reference_block(y, get, "trunk.3", kernels, gain)  # 8 -> 16 channels
    y = reference_block(y, get, "trunk.4", kernels, gain)
    weight, bias = get("output")
    y = F.conv2d(F.relu(y), weight[:, :, None, None], bias)
    torch.testing.assert_close(encoder(x).permute(0, 3, 1, 2), y, rtol=1e-5, atol=1e-5)


def test_decoder_is_the_published_one() -> None:
    torch.manual_seed(0)
    decoder = Decoder((8, 16), 2, vocab=11, n_init=5, channels=6, downsampling=2, stem="resnet")
    z = torch.randn(2, 11, 4, 4).softmax(dim=1)
    get, kernels, gain = Weights(decoder), (1, 3, 3, 3), 1 / 4**2
    weight, bias = get("input")
    y = F.conv2d(z, weight.T[:, :, None, None], bias)
    y = reference_block(y, get, "trunk.0", kernels, gain)  # 5 -> 16 channels
    y = reference_block(y, get, "trunk.1", kernels, gain)
    y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    y = reference_block(y, get, "trunk.3", kernels, gain)  # 16 -> 8
    y = reference_block(y, get, "trunk.4", kernels, gain)
    y = F.conv2d(F.relu(y), *get("output"))
    torch.testing.assert_close(decoder(z.permute(0, 2, 3, 1)), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem", ["resnet", "patch"])
@pytest.mark.parametrize("downsampling", [2, 4, 8])
def test_shapes(stem: str, downsampling: int) -> None:
    widths = (8, 8, 16, 16)
    encoder = Encoder(widths, 1, vocab=7, downsampling=downsampling, stem=stem)
    decoder = Decoder(widths, 1, vocab=7, n_init=4, channels=3, downsampling=downsampling, stem=stem)
    logits = encoder(torch.rand(2, 3, 16, 16))
    assert logits.shape == (2, 16 // downsampling, 16 // downsampling, 7)
    assert decoder(logits.softmax(dim=-1)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("downsampling", [2, 4])
def test_patch_stem_codes_see_their_patch_in_place(downsampling: int) -> None:
    """With all branches off, one code depends on its own square only, and drives its own square only."""
    encoder = Encoder((8,), 1, vocab=5, downsampling=downsampling, stem="patch")
    decoder = Decoder((8,), 1, vocab=5, n_init=8, channels=3, downsampling=downsampling, stem="patch")
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, Bottleneck):
            module.gain = 0.0
    image = torch.rand(1, 3, 4 * downsampling, 4 * downsampling, requires_grad=True)
    (seen,) = torch.autograd.grad(encoder(image)[0, 1, 2].sum(), image)
    inside = torch.zeros(4, 4)
    inside[1, 2] = 1
    square = inside.repeat_interleave(downsampling, 0).repeat_interleave(downsampling, 1)
    assert torch.equal((seen[0].abs().amax(dim=0) > 0).float(), square)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    changed = codes.clone()
    changed[0, 1, 2] = 3
    moved = (decoder(codes) - decoder(changed)).abs().amax(dim=1)[0] > 1e-6
    assert torch.equal(moved.float(), square)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    encoder = Encoder((64, 128), 2, vocab=256, downsampling=2, stem="resnet")
    decoder = Decoder((64, 128), 2, vocab=256, n_init=64, channels=6, downsampling=2, stem="resnet")
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Conv2d):
            n_in, kernel = module.in_channels, module.kernel_size[0]
            expected = 1 / math.sqrt(n_in * kernel**2)
            spread = 5 * expected / math.sqrt(2 * module.weight.numel())  # five standard errors
            assert abs(float(module.weight.detach().std()) - expected) < spread
            assert module.bias is not None and not module.bias.any()
    assert float(encoder.output.weight.detach().std()) == pytest.approx(1 / math.sqrt(128), rel=0.02)
    assert float(decoder.input.weight.detach().std()) == pytest.approx(1 / math.sqrt(256), rel=0.03)


def test_hard_codes_equal_one_hot_assignments() -> None:
    torch.manual_seed(0)
    layer = CodeEmbedding(9, 4)
    codes = torch.randint(9, (2, 3, 3))
    one_hot = F.one_hot(codes, 9).float()
    assert torch.equal(layer(codes), layer(one_hot))


def test_layers_next_to_the_relaxation_compute_in_fp32() -> None:
    torch.manual_seed(0)
    encoder = Encoder((64,), 1, vocab=32, downsampling=2, stem="patch").bfloat16()
    decoder = Decoder((64,), 1, vocab=32, n_init=16, channels=6, downsampling=2, stem="patch").bfloat16()
    hidden = torch.randn(1, 64, 4, 4, dtype=torch.bfloat16)
    exact = F.linear(hidden.double().permute(0, 2, 3, 1), encoder.output.weight.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = encoder.output(hidden)
            embedded = decoder.input(logits.softmax(dim=-1))
            assert embedded.dtype == torch.float32
            assert decoder(logits.softmax(dim=-1)).dtype == torch.bfloat16
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_only_the_code_matrices_are_embeddings() -> None:
    encoder = Encoder((8,), 1, vocab=5, downsampling=2, stem="patch")
    decoder = Decoder((8,), 1, vocab=5, n_init=8, channels=3, downsampling=2, stem="patch")
    for net, expected in ((encoder, "output.weight"), (decoder, "input.weight")):
        assert [name for name, p in net.named_parameters() if getattr(p, "is_embedding", False)] == [expected]


def test_activation_checkpointing_changes_no_number() -> None:
    torch.manual_seed(0)
    encoder = Encoder((8, 16), 1, vocab=5, downsampling=2, stem="resnet")
    x = torch.rand(2, 3, 8, 8)
    results = []
    for recompute in (False, True):
        for module in encoder.modules():
            if isinstance(module, Bottleneck):
                module.activation_checkpointing = recompute
        encoder.zero_grad()
        logits = encoder(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *[p.grad.clone() for p in encoder.parameters() if p.grad is not None]])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*results, strict=True))
    assert len(results[0]) == 1 + len(list(encoder.parameters()))


def test_halving_is_max_pooling_ties_included() -> None:
    values = torch.randint(3, (2, 5, 8, 6), generator=torch.Generator().manual_seed(0)).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, theirs = (values.clone(memory_format=layout).requires_grad_() for _ in range(2))
        found, wanted = Halve()(ours), F.max_pool2d(theirs, 2)
        assert torch.equal(found, wanted)
        upstream = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y, x in ((found, ours), (wanted, theirs))]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("kernels", [(1, 3, 3, 3), (3, 3, 3, 1), (3, 3)])
@pytest.mark.parametrize("n_out", [8, 12])
def test_a_block_on_a_doubled_map(kernels: tuple[int, ...], n_out: int) -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, n_out, kernels, 0.5).double()
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for y in (block(x, doubled=True), block(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))):
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_net_trains_as_written_plainly() -> None:
    """All gradients, with every way of convolving."""
    torch.manual_seed(0)
    encoder = Encoder((64, 128), 2, vocab=11, downsampling=2, stem="resnet").double()
    decoder = Decoder((64, 128), 1, vocab=11, n_init=5, channels=6, downsampling=2, stem="resnet").double()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    leaves = [*encoder.parameters(), *decoder.parameters()]
    results = []
    for device_of in (None, "elsewhere"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conv, "_FEWEST_PRODUCTS", 1)
            if device_of:  # as on GPUs
                patch.setattr(conv, "_has_own_way", lambda *_: False)
                patch.setattr(Bottleneck, "_on_cpu", _as_written)
                patch.setattr(Halve, "forward", lambda self, x: F.max_pool2d(x, 2))
            maps = decoder(encoder(x).softmax(dim=-1))
            results.append([maps, *torch.autograd.grad(maps.square().sum(), leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _as_written(self: Bottleneck, x: Tensor, doubled: bool) -> Tensor:
    x = F.interpolate(x, scale_factor=2.0) if doubled else x
    return torch.add(self.skip(x), self.branch(x), alpha=self.gain)
