"""AdamW with 16-bit states: against torch.optim.AdamW, its memory, its rounding, and what a checkpoint keeps."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dalle_scale.engine import adam16
from dalle_scale.engine.adam16 import AdamW16

HALF = (torch.bfloat16, torch.float16)
LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.96), 1e-6, 0.1


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 7), (33,), (2, 3, 4))]


def set_gradients(tensors: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def advance(tensors: list[nn.Parameter], optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[Tensor]:
    for step in range(start, stop):
        set_gradients(tensors, step)
        optimizer.step()
    return [tensor.detach().clone() for tensor in tensors]


def adamw16(tensors: list[nn.Parameter], **settings: Any) -> AdamW16:
    """Two groups, the first decayed."""
    groups = [{"params": tensors[:1], "weight_decay": DECAY}, {"params": tensors[1:]}]
    return AdamW16(groups, **{"lr": LR, "betas": BETAS, "eps": EPS, **settings})


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fp32_is_torchs() -> None:
    """fp32 parameters have fp32 moments whatever the 16-bit ones have."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    groups = [{"params": theirs[:1], "weight_decay": DECAY}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    got, want = advance(ours, adamw16(ours), 0, 20), advance(theirs, reference, 0, 20)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"states": "fp32", "rounding": "compensated"}, {torch.bfloat16: 2e-4, torch.float16: 3e-5}),
        ({"states": "paper", "rounding": "compensated"}, {torch.bfloat16: 5e-4, torch.float16: 5e-4}),
        ({"states": "bf16", "rounding": "compensated"}, {torch.bfloat16: 3e-3, torch.float16: 3e-3}),
        ({"states": "paper", "rounding": "stochastic"}, {torch.bfloat16: 5e-2, torch.float16: 6e-3}),
        ({"states": "paper", "rounding": "nearest"}, {torch.bfloat16: 5e-2, torch.float16: 6e-3}),
    ],
    ids=lambda value: "-".join(value.values()) if "states" in value else "",
)
def test_16_bits_follow_fp32(dtype: torch.dtype, settings: dict[str, str], tolerance: dict[torch.dtype, float]) -> None:
    """With what rounding took off added back, parameters are near those of fp32; without, a few of their steps off."""
    ours = parameters(dtype)
    theirs = [nn.Parameter(tensor.detach().float()) for tensor in ours]
    optimizer, reference = adamw16(ours, **settings), adamw16(theirs)
    for step in range(20):
        set_gradients(ours, step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.float()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        got = mine.detach().float().flatten()
        if "compensation" in optimizer.state[mine]:
            got += optimizer.state[mine]["compensation"].float()
        torch.testing.assert_close(got, other.detach().flatten(), rtol=tolerance[dtype], atol=tolerance[dtype])


@pytest.mark.parametrize(
    ("dtype", "states", "rounding", "want"),
    [
        (torch.bfloat16, "paper", "stochastic", 8),
        (torch.float16, "paper", "nearest", 8),
        (torch.bfloat16, "bf16", "stochastic", 8),
        (torch.bfloat16, "paper", "compensated", 10),
        (torch.bfloat16, "fp32", "stochastic", 12),
        (torch.bfloat16, "fp32", "compensated", 14),
        (torch.float32, "paper", "compensated", 16),
    ],
)
def test_bytes_a_parameter(dtype: torch.dtype, states: Any, rounding: Any, want: int) -> None:
    """Parameter, gradient and states, counted from what the tensors hold."""
    tensor = nn.Parameter(torch.ones(1000, dtype=dtype))
    tensor.grad = torch.ones_like(tensor)
    optimizer = AdamW16([tensor], lr=LR, states=states, rounding=rounding)
    optimizer.step()
    kept = [tensor, tensor.grad, *filter(torch.is_tensor, optimizer.state[tensor].values())]
    assert sum(one.untyped_storage().nbytes() for one in kept) == want * 1000


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_only_nearest_rounding_stalls(dtype: torch.dtype) -> None:
    """100 steps of a twentieth of the distance between neighbours: five neighbours further, or nowhere."""
    spacing = torch.finfo(dtype).eps
    travelled = {}
    for rounding in ("stochastic", "compensated", "nearest"):
        tensor = nn.Parameter(torch.full((2000,), 1.5, dtype=dtype))
        optimizer = AdamW16([tensor], lr=spacing / 20, rounding=rounding, eps=1e-12)  # type: ignore[arg-type]
        for _ in range(100):
            tensor.grad = torch.ones_like(tensor)
            optimizer.step()
        travelled[rounding] = float((1.5 - tensor.detach().float()).mean()) / spacing
    assert travelled["nearest"] == 0
    assert travelled["compensated"] == pytest.approx(5, abs=0.5)  # the last whole step
    assert travelled["stochastic"] == pytest.approx(5, abs=5 * math.sqrt(5 / 2000))  # five standard errors


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_variance_is_clipped_before_it_is_used_and_stored(dtype: torch.dtype) -> None:
    """A gradient of 100 would make it 0.04 * 100^2 = 400. It is 5, and decays from there."""
    tensor = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = AdamW16([tensor], lr=1.0, betas=BETAS, states="fp32", rounding="nearest")
    tensor.grad = torch.full_like(tensor, 100)
    optimizer.step()
    want = -100 / math.sqrt(5 / (1 - BETAS[1]))  # the mean corrected for its start is the gradient
    assert tensor.item() == pytest.approx(want, rel=torch.finfo(dtype).eps)
    variance = optimizer.state[tensor]["variance"].view(torch.float32)
    assert variance.item() == 5
    tensor.grad.zero_()
    optimizer.step()
    assert variance.item() == pytest.approx(5 * BETAS[1])


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("states", ["paper", "bf16", "fp32"])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_resume_is_exact(dtype: torch.dtype, states: str, rounding: str) -> None:
    """Saved, loaded by an optimizer that never took a step, and gone on: the bits of a run that never stopped."""
    first = parameters(dtype)
    optimizer = adamw16(first, states=states, rounding=rounding)
    second = list(map(nn.Parameter, advance(first, optimizer, 0, 3)))
    resumed = adamw16(second, states=states, rounding=rounding)
    resumed.load_state_dict(saved(optimizer))
    for before, after in zip(first, second, strict=True):
        for name, value in optimizer.state[before].items():
            if torch.is_tensor(value):
                assert value.dtype == dtype  # else loading would have converted it
                assert torch.equal(value.view(torch.int8), resumed.state[after][name].view(torch.int8)), name
    assert_same_bits(advance(second, resumed, 3, 6), advance(first, optimizer, 3, 6))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_code_survives_a_checkpoint(dtype: torch.dtype) -> None:
    """Also those that are NaN in the dtype of the tensor that holds them."""
    codes = torch.arange(1 << 16).to(torch.int16)
    tensors = [nn.Parameter(torch.zeros(1 << 16, dtype=dtype)) for _ in range(2)]
    optimizers = [AdamW16([tensor], lr=LR) for tensor in tensors]
    tensors[0].grad = torch.zeros_like(tensors[0])
    optimizers[0].step()
    optimizers[0].state[tensors[0]]["mean"].view(torch.int16).copy_(codes)
    assert optimizers[0].state[tensors[0]]["mean"].isnan().sum() > 200
    optimizers[1].load_state_dict(saved(optimizers[0]))
    assert torch.equal(optimizers[1].state[tensors[1]]["mean"].view(torch.int16), codes)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("divisor", [2.0**10, 2.0**-6])
def test_scaled_gradients_are_divided_in_fp32(dtype: torch.dtype, divisor: float) -> None:
    """By a power of two: the bits of weights and states of an unscaled run. A divisor is that of its own group."""
    runs = []
    for scale in (1.0, divisor):
        tensors = parameters(dtype)
        optimizer = adamw16(tensors)
        for step in range(4):
            set_gradients(tensors, step)
            scale_now = scale if step < 3 else 1.0
            tensors[0].grad *= scale_now  # type: ignore[operator]
            optimizer.param_groups[0]["gradient_divisor"] = scale_now
            optimizer.step()
        states = [state[name] for state in optimizer.state.values() for name in ("mean", "variance")]
        runs.append([value.detach().view(torch.int8) for value in (*tensors, *states)])
    assert_same_bits(*runs)


def test_division_keeps_gradients_below_what_16_bits_hold() -> None:
    """Gradients of 2^-40 and, by norm clipping, of a third: as if they had come in fp32."""
    grown = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = AdamW16([grown], lr=LR, states="fp32")
    grown.grad = torch.full_like(grown, 2.0**-10)
    optimizer.param_groups[0]["gradient_divisor"] = 3 * 2.0**30
    optimizer.step()
    mean = optimizer.state[grown]["mean"].view(torch.float32)
    assert mean.item() == pytest.approx((1 - BETAS[0]) * 2.0**-40 / 3, rel=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_chunks_do_not_matter(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = parameters(torch.bfloat16)
    whole = advance(want, adamw16(want, rounding=rounding), 0, 4)
    monkeypatch.setattr(adam16, "CHUNK_ON_CPU", 8)
    got = parameters(torch.bfloat16)
    assert_same_bits(advance(got, adamw16(got, rounding=rounding), 0, 4), whole)


def test_noise_differs_by_seed_step_tensor_and_position_only() -> None:
    """Equal elements, equal gradients: rounded the same way by the same seed, independently otherwise."""

    def ups(seed: int) -> Tensor:
        """Which elements went down in each of two steps: bool [step * tensor, position]."""
        tensors = [nn.Parameter(torch.ones(4000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = AdamW16(tensors, lr=2.0**-10, seed=seed)  # a quarter of the distance to the next number below 1
        rows = []
        for _ in range(2):
            for tensor in tensors:
                tensor.data.fill_(1.0)
                tensor.grad = torch.ones_like(tensor)
            optimizer.step()
            rows += [tensor.detach() < 1 for tensor in tensors]
        return torch.stack(rows)

    first, other = ups(0), ups(1)
    assert torch.equal(first, ups(0))
    rows = torch.cat([first, other, first.roll(1, dims=1)]).double()
    assert ((rows.mean(1) - 0.25).abs() < 0.035).all()  # five standard errors
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 5 / math.sqrt(4000)


def test_a_gradient_that_is_not_finite_is_seen() -> None:
    for bad in (math.inf, math.nan):
        tensors = parameters(torch.bfloat16)
        optimizer = adamw16(tensors)
        set_gradients(tensors, 0)
        tensors[0].grad[1, 2] = bad  # type: ignore[index]
        optimizer.step()
        assert not tensors[0].isfinite()[1, 2] and tensors[0].isfinite().sum() == 34


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)]
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), *hidden, nn.Linear(64, 8))


def final_loss(dtype: torch.dtype, steps: int = 120, **settings: Any) -> float:
    """Mean loss of the last 50 steps of a student of a fixed net: matrices in `dtype`, gains and biases in fp32,
    computation in fp32, because 16-bit products are slow on CPUs; the learning rate falls to 0 as a cosine."""
    net, teacher = mlp(0), mlp(1)
    for parameter in net.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.to(dtype)
    optimizer = AdamW16(net.parameters(), lr=0.0, weight_decay=0.045, **settings)
    generator, losses = torch.Generator().manual_seed(5), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.0015 * min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps))
        inputs = torch.randn(64, 16, generator=generator)
        with torch.no_grad():
            want = teacher(inputs)
        loss = (functional_call(net, {n: p.float() for n, p in net.named_parameters()}, inputs) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@pytest.fixture(scope="module")
def fp32_loss() -> float:
    return final_loss(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "states", "rounding"),
    [
        (torch.bfloat16, "paper", "stochastic"),
        (torch.bfloat16, "paper", "compensated"),
        (torch.bfloat16, "bf16", "stochastic"),
        (torch.float16, "paper", "stochastic"),
    ],
)
def test_training_is_that_of_fp32(dtype: torch.dtype, states: str, rounding: str, fp32_loss: float) -> None:
    """Within 0.5 %; rounding to nearest loses 3 %."""
    assert final_loss(dtype, states=states, rounding=rounding) == pytest.approx(fp32_loss, rel=0.005)


def test_training_with_nearest_rounding_falls_behind(fp32_loss: float) -> None:
    assert final_loss(torch.bfloat16, rounding="nearest") > 1.015 * fp32_loss
