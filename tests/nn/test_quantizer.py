"""The vector quantizer against brute force, plain formulas and loops in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dalle_scale.nn import kmeans
from dalle_scale.nn.vector_quantizer import Quantizer, QuantizerConfig, rotate, straight_through
from dalle_scale.types import UserError

K, D = 16, 6


def make(seed: int = 0, dim: int = D, **values: Any) -> Quantizer:
    torch.manual_seed(seed)
    quantizer = Quantizer(QuantizerConfig(**{"vocab": K, **values}), dim)
    with torch.no_grad():
        quantizer.codebook.copy_(quantizer._on_sphere(torch.randn_like(quantizer.codebook)))
    return quantizer


def features(seed: int, batch: int = 4, dim: int = D, side: int = 3) -> Tensor:
    """As an encoder gives them: they require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, side, side, generator=generator).requires_grad_()


def rows(x: Tensor) -> Tensor:
    """[B, D, H, W] -> [B H W, D] in float64."""
    return x.detach().double().permute(0, 2, 3, 1).flatten(0, 2)


def brute_force(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(rows(x), codebook.detach().double()).argmin(dim=1).view(x.shape[0], *x.shape[2:])


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.named_buffers()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_nearest_codes_against_brute_force(update: str) -> None:
    quantizer, x = make(update=update), features(1, batch=20)
    want = brute_force(x, quantizer.codebook)
    got = quantizer(x)
    assert isinstance(got, tuple), "ZeRO 3 would leave the codebook cut up in the backward pass"
    assert got.codes.dtype == torch.int64 and torch.equal(got.codes, want) and torch.equal(quantizer.encode(x), want)
    assert torch.equal(got.values, quantizer.codebook[want].permute(0, 3, 1, 2))
    assert torch.equal(got.values, quantizer.lookup(want))


def test_cosine_is_nearest_by_angle() -> None:
    quantizer, x = make(cosine=True), features(1, batch=20)
    similarity = torch.nn.functional.normalize(rows(x), dim=1) @ quantizer.codebook.double().T
    assert torch.equal(quantizer.encode(x).flatten(), similarity.argmax(dim=1))


@pytest.mark.parametrize("values", [{}, {"code_dim": 2}])
def test_is_fp32_whatever_surrounds_it(values: dict[str, Any]) -> None:
    quantizer, x = make(**values), features(1, batch=20).detach().bfloat16().requires_grad_()
    want = quantizer.encode(x.float())
    if not values:
        assert torch.equal(want, brute_force(x, quantizer.codebook))
    with torch.autocast("cpu", torch.bfloat16):
        got = quantizer(x)
        assert torch.equal(quantizer.encode(x), want)
    assert torch.equal(got.codes, want)
    assert got.values.dtype == torch.bfloat16 and got.loss.dtype == torch.float32
    quantizer.after_step(0)
    assert {buffer.dtype for buffer in quantizer.buffers()} == {torch.float32}


def test_no_tensor_is_vectors_times_codes_large() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    quantizer, x = make(vocab=2048, restart_below=1.0), features(0, batch=1, side=128)
    with Largest() as seen:
        quantizer(x).loss.sum().backward()
        quantizer.after_step(0)
    assert seen.numel <= kmeans._CHUNK_VALUES < 128 * 128 * 2048


def test_ema_against_a_loop_in_float64() -> None:
    """Appendix A.1, with micro-batches and empty slots; 30 steps of fp32 carry rounding to about 1e-6."""
    quantizer = make(ema_decay=0.9)
    codes, counts, sums = quantizer.codebook.double(), torch.zeros(K).double(), torch.zeros(K, D).double()
    for step in range(30):
        n, total = torch.zeros(K).double(), torch.zeros(K, D).double()
        for micro in range(2):
            x, weight = features(2 * step + micro), torch.tensor([2.0, 0.0, 1.5, 0.5])
            nearest = torch.cdist(rows(x), codes).argmin(dim=1).view(4, -1)
            vectors, kept = rows(x).view(4, -1, D)[weight > 0].flatten(0, 1), nearest[weight > 0].flatten()
            for vector, code in zip(vectors, kept, strict=True):
                n[code] += 1
                total[code] += vector
            with torch.no_grad():
                x[1] = math.inf  # an empty slot may hold anything
            quantizer(x, weight)
        counts, sums = 0.9 * counts + 0.1 * n, 0.9 * sums + 0.1 * total
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None], codes)
        quantizer.after_step(step)
        torch.testing.assert_close(quantizer.codebook.double(), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.ema_counts.double(), counts, rtol=1e-4, atol=1e-5)
    assert float(quantizer.mass) == pytest.approx(1 - 0.9**30, rel=1e-5)


def test_the_start_pulls_nothing() -> None:
    """After one update each used code is the mean of its vectors, whatever gamma; others have not moved at all."""
    quantizer, x = make(ema_decay=0.999), features(0, batch=2, side=2)
    before = quantizer.codebook.clone()
    codes = quantizer(x).codes.flatten()
    quantizer.after_step(0)
    for code in range(K):
        want = rows(x)[codes == code].mean(dim=0) if (codes == code).any() else before[code].double()
        torch.testing.assert_close(quantizer.codebook[code].double(), want, rtol=1e-5, atol=1e-6)


def test_thousands_of_updates_keep_constant_counts_and_an_unused_code() -> None:
    quantizer = make(vocab=2)
    with torch.no_grad():
        quantizer.codebook[0], quantizer.codebook[1] = 1.0, 50.0
    x = torch.full((1, D, 20, 10), 1.5, requires_grad=True)
    for step in range(2_000):
        quantizer(x)
        quantizer.after_step(step)
    assert quantizer.ema_counts.tolist() == pytest.approx([200.0, 0.0], rel=1e-4)
    assert torch.equal(quantizer.codebook[1], torch.full((D,), 50.0))
    torch.testing.assert_close(quantizer.codebook[0], torch.full((D,), 1.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("update", ["ema", "loss"])
def test_losses_and_gradients_against_the_plain_formula(update: str) -> None:
    """beta is on the commitment term, whose gradient goes to the encoder; the codebook term's goes to the codes."""
    quantizer, x = make(update=update, commitment=0.3), features(3)
    codes = brute_force(x, quantizer.codebook)
    z = x.detach().clone().requires_grad_()
    e = quantizer.codebook.detach().clone().requires_grad_()
    chosen = e[codes].permute(0, 3, 1, 2)
    want = 0.3 * (z - chosen.detach()).pow(2).mean(dim=(1, 2, 3))
    if update == "loss":
        want = want + (z.detach() - chosen).pow(2).mean(dim=(1, 2, 3))
    got = quantizer(x).loss
    torch.testing.assert_close(got, want)
    weights = torch.arange(1.0, 5.0)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    if update == "loss":
        torch.testing.assert_close(quantizer.codebook.grad, e.grad)
    else:
        assert list(quantizer.parameters()) == [], "an optimizer would move the codes too"


def test_straight_through_passes_the_gradient_unchanged() -> None:
    quantizer, x = make(commitment=0.0), features(4)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (quantizer(x).values * gradient).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, gradient)


def test_reconstruction_does_not_train_the_codebook() -> None:
    quantizer, x = make(update="loss"), features(4)
    quantizer(x).values.square().sum().backward()
    assert quantizer.codebook.grad is None and x.grad is not None


def plane_rotation(start: Tensor, end: Tensor) -> Tensor:
    """The rotation that takes the direction of `start` to that of `end` in their plane and leaves the rest: [D, D]."""
    u, target = start / start.norm(), end / end.norm()
    cosine = u @ target
    v = target - cosine * u
    v, sine = v / v.norm(), v.norm()
    in_plane = (cosine - 1) * (torch.outer(u, u) + torch.outer(v, v))
    return torch.eye(len(u), dtype=u.dtype) + in_plane + sine * (torch.outer(v, u) - torch.outer(u, v))


def test_rotation_trick() -> None:
    """The value is the code exactly; the gradient is that of a constant scaled rotation."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, D, generator=generator).requires_grad_()
    chosen = torch.randn(20, D, generator=generator)
    gradient = torch.randn(20, D, generator=generator)
    values = rotate(vectors, chosen)
    assert torch.equal(values, chosen) and torch.equal(straight_through(vectors, chosen), chosen)
    (values * gradient).sum().backward()
    assert vectors.grad is not None
    for e, q, g, got in zip(vectors.detach().double(), chosen.double(), gradient.double(), vectors.grad, strict=True):
        rotation = q.norm() / e.norm() * plane_rotation(e, q)
        torch.testing.assert_close(rotation @ e, q)
        torch.testing.assert_close(got.double(), rotation.T @ g, rtol=1e-4, atol=1e-5)


def test_rotation_of_vectors_without_direction_stays_finite() -> None:
    vectors = torch.stack([torch.zeros(D), -torch.ones(D), torch.ones(D)]).requires_grad_()
    chosen = torch.ones(3, D)
    values = rotate(vectors, chosen)
    values.sum().backward()
    assert torch.equal(values, chosen) and vectors.grad is not None and vectors.grad.isfinite().all()


def test_rotation_in_the_quantizer() -> None:
    quantizer, x = make(rotation=True, commitment=0.0), features(5)
    z = x.detach().permute(0, 2, 3, 1).clone().requires_grad_()
    got = quantizer(x)
    rotate(z, quantizer.codebook[got.codes]).square().sum().backward()
    got.values.square().sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(x.grad, z.grad.permute(0, 3, 1, 2))


def test_low_dimensional_codes() -> None:
    quantizer, x = make(code_dim=2, cosine=True, update="loss"), features(6)
    got = quantizer(x)
    assert quantizer.codebook.shape == (K, 2) and got.values.shape == x.shape
    assert torch.equal(got.values, quantizer.lookup(got.codes))
    (got.values.square().mean() + got.loss.mean()).backward()
    assert [name for name, p in quantizer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_cosine_codes_stay_on_the_sphere() -> None:
    quantizer = make(cosine=True, restart_below=2.0)
    for step in range(10):
        quantizer(features(step))
        quantizer.after_step(step)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(K))


def test_what_does_not_count() -> None:
    """Evaluation, passes without gradients, the turn of another net, and steps without a forward."""
    quantizer = make(restart_below=1.0)
    quantizer(features(0))
    quantizer.after_step(0)
    before = state(quantizer)
    quantizer.eval()
    quantizer(features(1))
    quantizer.train()
    with torch.no_grad():
        quantizer(features(1).detach())
    quantizer(features(1).detach())  # features of a frozen encoder
    quantizer.encode(features(1))
    quantizer.after_step(1)
    assert_same(state(quantizer), before)


def test_recomputed_forwards_do_not_count_again() -> None:
    plain, recomputed = make(restart_below=1.0), make(restart_below=1.0)

    def values_of(x: Tensor) -> Tensor:
        quantized = recomputed(2 * x)
        return quantized.values.square().sum() + quantized.loss.sum()

    for step in range(3):
        x, again = features(step), features(step)
        quantized = plain(2 * x)
        (quantized.values.square().sum() + quantized.loss.sum()).backward()
        checkpoint(values_of, again, use_reentrant=False).backward()
        assert float(recomputed.counts.sum()) == 4 * 9
        torch.testing.assert_close(x.grad, again.grad)
        plain.after_step(step)
        recomputed.after_step(step)
        assert_same(state(recomputed), state(plain))


@pytest.mark.parametrize("restart_below", [0.0, 1.5])
def test_micro_batches_are_one_batch(restart_below: float) -> None:
    """Restarts draw the same vectors; sums in another order differ by rounding."""
    whole, halves = make(restart_below=restart_below), make(restart_below=restart_below)
    for step in range(8):
        x, seeds = features(step, batch=6), torch.arange(6) + 100 * step
        weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
        whole(x, weight, seeds)
        for part in (slice(4, 6), slice(0, 4)):
            halves(x[part], weight[part], seeds[part])
        whole.after_step(step)
        halves.after_step(step)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(halves)[name], value, rtol=1e-4, atol=1e-5)


def test_dead_codes_restart_with_all_that_belongs_to_them() -> None:
    """A restarted code is one of the batch's vectors, keeps to it by its share, and has time to find use."""
    quantizer = make(restart_below=1.0, ema_decay=0.9)
    with torch.no_grad():
        quantizer.codebook[4:] = 1000.0
    x = features(0, batch=8, side=4)
    quantizer(x)
    quantizer.after_step(0)
    restarted = quantizer.codebook[4:].double()
    distance = torch.cdist(restarted, rows(x)).min(dim=1).values
    assert float(distance.max()) < 1e-6 and len(torch.unique(restarted, dim=0)) > 8
    torch.testing.assert_close(quantizer.ema_counts[4:], torch.full((12,), 1.1 * 0.1))
    torch.testing.assert_close(quantizer.ema_sums[4:].double(), 0.11 * restarted, rtol=1e-5, atol=1e-6)
    used = quantizer(features(1, batch=8, side=4)).codes.unique()
    assert len(used) > 10


def test_codes_in_use_do_not_restart() -> None:
    quantizer, still = make(restart_below=0.0), make(restart_below=0.5)
    for step in range(5):
        x = features(step, batch=200)
        assert len(quantizer(x).codes.unique()) == K
        still(x)
        quantizer.after_step(step)
        still.after_step(step)
    assert torch.equal(quantizer.codebook, still.codebook)


def test_restarts_draw_by_squared_distance() -> None:
    """Of 4 kinds of vectors at squared distances 0, 1, 4, 9 from the only near code; 3 standard deviations allowed."""
    drawn = torch.zeros(4)
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    x = x.repeat(50, 1, 1, 1).requires_grad_()
    for seed in range(150):
        quantizer = make(vocab=2, dim=1, restart_below=1.0)
        with torch.no_grad():
            quantizer.codebook.copy_(torch.tensor([[0.0], [1000.0]]))
        quantizer(x, seeds=torch.arange(50) + 50 * seed)
        quantizer.after_step(0)
        drawn[int(quantizer.codebook[1].round())] += 1
    share = torch.tensor([0.0, 1.0, 4.0, 9.0]) / 14
    assert ((drawn / 150 - share).abs() <= 3 * (share * (1 - share) / 150).sqrt()).all()


def test_all_codes_find_a_cluster() -> None:
    """From a codebook that has collapsed to a point, far away from 64 clusters."""
    centres = 10 * torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    quantizer = make(vocab=64, restart_below=1.0)
    with torch.no_grad():
        quantizer.codebook.fill_(100.0)
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(64, (16, 8, 8), generator=generator)
        x = centres[chosen] + 0.1 * torch.randn(16, 8, 8, D, generator=generator)
        codes = quantizer(x.permute(0, 3, 1, 2).requires_grad_()).codes
        quantizer.after_step(step)
    assert len(codes.unique()) > 0.95 * 64
    # one code a cluster, but for clusters that share what is left over
    assert sum(len(codes[chosen == index].unique()) == 1 for index in range(64)) > 50


@pytest.mark.parametrize("values", [{}, {"code_dim": 3}, {"cosine": True}, {"update": "loss"}])
def test_kmeans_start(values: dict[str, Any]) -> None:
    centres = 10 * torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(20, K, D, generator=torch.Generator().manual_seed(1))
    quantizer = make(init="kmeans", **values)
    quantizer.initialize((centres + noise).flatten(0, 1))
    codes = quantizer.encode(centres.T[None, :, :, None])
    assert len(codes.unique()) == K
    if not values:
        torch.testing.assert_close(quantizer.codebook[codes.flatten()], centres, rtol=0, atol=0.02)
    with pytest.raises(UserError, match=r"15 vectors cannot give 16 codes; raise quantizer\.init_samples"):
        quantizer.initialize(centres[:15])


def test_resumes_bit_exact() -> None:
    whole = make(restart_below=1.5)
    for step in range(4):
        whole(features(step))
        whole.after_step(step)
        if step == 1:
            resumed = make(seed=7, restart_below=1.5)
            resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
        elif step > 1:
            resumed(features(step))
            resumed.after_step(step)
    assert_same(state(resumed), state(whole))


def test_refuses_restarts_of_codes_that_the_optimizer_owns() -> None:
    with pytest.raises(ValidationError, match="needs update: ema"):
        QuantizerConfig(update="loss", restart_below=1.0)
