"""The VAE stage: bounds against numeric integration, loss, free bits, invariances, sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from support.batches import rows, same_images
from support.processes import in_ranks
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from dalle_scale import config as run_config
from dalle_scale import dist
from dalle_scale.checkpoint import export
from dalle_scale.models.vae import DiagonalGaussian
from dalle_scale.nn.counter_rng import normal_noise
from dalle_scale.nn.likelihoods import phi, to_bytes
from dalle_scale.stages.vae import VAE, Stage
from dalle_scale.types import Batch, UserError

TINY = {"image_size": 8, "n_hid": 8, "multipliers": (1, 2), "blocks_per_group": 1, "latent_channels": 3}
ONE = {"image_size": 4, "n_hid": 8, "multipliers": (1, 1), "blocks_per_group": 1, "latent": "vector"}
LIKELIHOODS = ("bernoulli", "gaussian", "discretised_logistic")


def make(**values: Any) -> tuple[Stage, VAE]:
    """Stage and model with seeded weights."""
    torch.manual_seed(0)
    stage = Stage(run_config.parse(Stage.Config, values, where="test"))
    model = stage.nets()["model"]
    assert isinstance(model, VAE)
    return stage, model


def batch_of(count: int, size: int = 8, seed: int = 0) -> Batch:
    """Images of one colour and a little noise, channels last."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(40, 216, (count, 3, 1, 1), generator=generator)
    images = colours + torch.randint(-20, 20, (count, 3, size, size), generator=generator)
    images = images.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return {"image": images, "seed": 1000 * seed + torch.arange(count), "weight": torch.ones(count)}


def test_kl_and_density_are_those_of_torch() -> None:
    torch.manual_seed(0)
    mean, log_variance, noise = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2), torch.randn(5, 12)
    ours, reference = DiagonalGaussian(mean, log_variance), Normal(mean, torch.exp(log_variance / 2))
    torch.testing.assert_close(ours.kl(), kl_divergence(reference, Normal(0.0, 1.0)), rtol=1e-4, atol=1e-5)
    z = ours.at(noise)
    torch.testing.assert_close(ours.log_prob(z), Independent(reference, 3).log_prob(z), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((z - mean) / reference.stddev, noise.view_as(z), rtol=1e-4, atol=1e-5)
    assert not DiagonalGaussian(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)).kl().any()


def one_dimension(likelihood: str) -> tuple[Stage, VAE, Tensor]:
    """A VAE of one latent number whose decoder depends on it enough, and an image."""
    stage, model = make(**ONE, latent_channels=1, likelihood=likelihood, importance_samples=1)
    with torch.no_grad():
        model.decoder.output.weight.mul_(1.0 if likelihood == "bernoulli" else 0.4)
        model.encoder.output.weight.mul_(0.3)
    return stage, model, batch_of(1, size=4)["image"]


@torch.no_grad()
def exact(stage: Stage, model: VAE, image: Tensor) -> tuple[float, float]:
    """(ELBO, log p(x)) in nats, by midpoint sums over z."""
    step = 2e-3
    z = torch.arange(-9, 9, step, dtype=torch.float64) + step / 2
    target = phi(image).expand(1500, -1, -1, -1)
    log_likelihood = torch.cat(
        [
            -stage.likelihood.nll(model.decoder(part.view(-1, 1, 1, 1)), target).double().sum(dim=(1, 2, 3))
            for part in z.float().split(1500)
        ]
    )
    mean, log_variance = (value.double().flatten() for value in model.encoder(phi(image)))
    q, prior = Normal(mean, torch.exp(log_variance / 2)), Normal(torch.zeros(1, dtype=torch.float64), 1.0)
    weights = q.log_prob(z).exp() * step
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    elbo = (weights * (log_likelihood + prior.log_prob(z) - q.log_prob(z))).sum()
    return float(elbo), float(torch.logsumexp(log_likelihood + prior.log_prob(z) + math.log(step), dim=0))


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretised_logistic"])
def test_bounds_against_numeric_integration(likelihood: str) -> None:
    stage, model, image = one_dimension(likelihood)
    elbo, log_p = exact(stage, model, image)
    nats_per_bit_per_dim = 48 * math.log(2)
    gap = log_p - elbo
    assert gap > 0.1, "a posterior that fits would prove nothing"
    copies, bounds = 3000, []
    batch = {"image": image.expand(copies, -1, -1, -1), "seed": torch.arange(copies), "weight": torch.ones(copies)}
    for draws in (1, 4, 16):
        stage, _ = make(**ONE, latent_channels=1, likelihood=likelihood, importance_samples=draws)
        result = stage.evaluate({"model": model}, [batch])
        tolerance = 0.1 * gap / math.sqrt(draws)
        assert -result["elbo_bits_per_dim"] * nats_per_bit_per_dim == pytest.approx(elbo, abs=tolerance)
        bounds.append(-result["iwae_bits_per_dim"] * nats_per_bit_per_dim)
    assert elbo - 0.1 * gap < bounds[0] < bounds[1] < bounds[2] < log_p + 0.02 * gap
    assert log_p - bounds[2] < 0.25 * gap
    # the loss of training estimates the same ELBO, from one sample
    terms = stage.loss("model", {"model": model}, batch, step=5).terms
    assert -float(terms["bits_per_dim"]) * nats_per_bit_per_dim == pytest.approx(elbo, abs=0.1 * gap)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("latent", ["map", "vector"])
def test_loss_by_the_definition(likelihood: str, latent: str) -> None:
    stage, model = make(**TINY, likelihood=likelihood, latent=latent, beta=2.0, free_bits_nats=0.7)
    batch = batch_of(3)
    losses = stage.loss("model", {"model": model}, batch, step=7)
    total = nll_sum = kl_sum = 0.0
    for image, seed in zip(batch["image"], batch["seed"], strict=True):
        mean, log_variance = model.encoder(phi(image[None]))
        z = mean + torch.exp(log_variance / 2) * normal_noise(seed[None], 7, mean.numel()).view_as(mean)
        assert z.shape == ((1, 3, 4, 4) if latent == "map" else (1, 3, 1, 1))
        nll = float(stage.likelihood.nll(model.decoder(z), phi(image[None])).sum().detach())
        kl = kl_divergence(Normal(mean, torch.exp(log_variance / 2)), Normal(0.0, 1.0)).sum(dim=(0, 2, 3)).tolist()
        total += (nll + 2.0 * sum(max(0.7, channel) for channel in kl)) / 192
        nll_sum, kl_sum = nll_sum + nll, kl_sum + sum(kl)
    assert losses.total.item() == pytest.approx(total / 3, rel=1e-4)
    assert float(losses.terms["nll"]) == pytest.approx(nll_sum / 3 / 192, rel=1e-4)
    assert float(losses.terms["kl"]) == pytest.approx(kl_sum / 3, rel=1e-4)
    if likelihood == "gaussian":
        assert "bits_per_dim" not in losses.terms, "a density is no code length"
    else:
        bits = (nll_sum + kl_sum) / 3 / 192 / math.log(2)
        assert float(losses.terms["bits_per_dim"]) == pytest.approx(bits, rel=1e-4)


def test_beta_warms_up() -> None:
    stage, model = make(**TINY, beta=3.0, beta_warmup_steps=100)
    assert [stage.beta(step) for step in (0, 50, 100, 10**6)] == pytest.approx([0, 1.5, 3, 3])
    batch = batch_of(4)
    losses = stage.loss("model", {"model": model}, batch, step=0)
    assert float(losses.total.detach()) == pytest.approx(float(losses.terms["nll"])) and float(losses.terms["kl"]) > 0
    assert make(**TINY)[0].beta(0) == 1


def test_free_bits_are_free() -> None:
    """A channel below its allowance costs the allowance and its KL pulls on nothing; one above pays in full."""
    batch = batch_of(1)
    gradients = {}
    for free in (0.0, 1.0):
        stage, model = make(**TINY, free_bits_nats=free)
        with torch.no_grad():
            model.encoder.output.weight.zero_()
            # channel 0: KL = 16 * 0.5 * 0.01 = 0.08 nats; 1: 16 * 0.5 * 0.25 = 2 nats; 2: none
            model.encoder.output.bias.copy_(torch.tensor([0.1, 0.5, 0.0, 0.0, 0.0, 0.0]))
            model.decoder.input.weight.zero_()  # so that nothing but the KL reaches the latent
        losses = stage.loss("model", {"model": model}, batch, step=0)
        losses.total.backward()
        paid = (float(losses.total.detach()) - float(losses.terms["nll"])) * 192
        assert paid == pytest.approx(0.08 + 2 if free == 0 else 1 + 2 + 1, abs=2e-3)
        assert float(losses.terms["kl"]) == pytest.approx(2.08, abs=1e-4)
        assert model.encoder.output.bias is not None and model.encoder.output.bias.grad is not None
        gradients[free] = (192 / 16 * model.encoder.output.bias.grad[:3]).tolist()  # d KL / d mean = mean
    assert gradients[0.0] == pytest.approx([0.1, 0.5, 0.0], abs=1e-5)
    assert gradients[1.0] == pytest.approx([0.0, 0.5, 0.0], abs=1e-5)


def test_loss_of_a_sample_does_not_depend_on_its_batch() -> None:
    stage, model = make(**TINY, free_bits_nats=4.0)
    nets, batch = {"model": model}, batch_of(6)
    kl = [float(stage.loss("model", nets, rows(batch, [i]), 3).terms["kl"]) for i in range(6)]
    assert min(kl) < 12 < max(kl), "free bits must matter for some and not for others"
    alone = [stage.loss("model", nets, rows(batch, [i]), 3).total.item() for i in range(6)]
    together = stage.loss("model", nets, rows(batch, [5, 3, 1, 0, 2, 4]), 3)
    assert together.total.item() == pytest.approx(sum(alone) / 6, rel=1e-5)
    for changed, step in ((batch, 4), ({**batch, "seed": batch["seed"] + 9}, 3)):
        assert stage.loss("model", nets, changed, step).total.item() != pytest.approx(sum(alone) / 6, rel=1e-5)


@pytest.mark.parametrize("latent", ["map", "vector"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_training_lowers_the_loss_and_moves_every_parameter(likelihood: str, latent: str) -> None:
    stage, model = make(**{**TINY, "n_hid": 16}, likelihood=likelihood, latent=latent)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch, history = batch_of(16), []
    for step in range(20):
        optimizer.zero_grad()
        losses = stage.loss("model", {"model": model}, batch, step)
        losses.total.backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert step or not still
        optimizer.step()
        history.append(float(losses.total.detach()))
    assert sum(history[-3:]) / 3 < history[0] - (0.02 if likelihood == "bernoulli" else 0.3)


def test_gaussian_of_fixed_std() -> None:
    stage, model = make(**TINY, likelihood="gaussian", gaussian_std=0.1)
    batch = batch_of(4)
    losses = stage.loss("model", {"model": model}, batch, 0)
    maps, _, _ = model(batch["image"], batch["seed"], 0)
    assert maps.shape[1] == 3
    reference = -Normal(maps, 0.1).log_prob(phi(batch["image"])).mean()
    assert float(losses.terms["nll"]) == pytest.approx(float(reference.detach()), rel=1e-5)
    assert set(stage.evaluate({"model": model}, [batch])) == {"psnr_db", "kl_nats"}


def test_evaluate_does_not_depend_on_batches_and_leaves_out_empty_slots() -> None:
    stage, model = make(**TINY, importance_samples=5)
    nets, batch = {"model": model}, batch_of(7)
    whole = stage.evaluate(nets, [batch])
    padded = rows(batch, [6, 2, 4, 5, 0])
    padded["weight"] = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.5])  # the loop scales them; here a sample counts once
    assert stage.evaluate(nets, iter([padded, rows(batch, [3, 1, 2])])) == pytest.approx(whole, rel=1e-6)
    maps, mean, log_variance = model(batch["image"])
    pixels = (255 / 0.8 * (stage.likelihood.mean(maps).double() - 0.1)).clamp(0, 255)
    mse = float((pixels - batch["image"]).square().mean().detach())
    assert whole["psnr_db"] == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-5)
    kl = kl_divergence(Normal(mean, torch.exp(log_variance / 2)), Normal(0.0, 1.0)).sum() / 7
    assert whole["kl_nats"] == pytest.approx(float(kl.detach()), rel=1e-5)
    assert whole["iwae_bits_per_dim"] < whole["elbo_bits_per_dim"]


def evaluate_on_rank(rank: int, folder: str) -> None:
    """One of two ranks, each with its share of seven images."""
    torch_dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    stage, model = make(**TINY, importance_samples=5)
    mine = rows(batch_of(7), slice(0, 5) if rank == 0 else slice(5, 7))
    torch.save(stage.evaluate({"model": model}, [mine]), f"{folder}/{rank}.pt")
    dist.leave()


def test_evaluate_is_global_over_ranks(tmp_path: Path) -> None:
    in_ranks(evaluate_on_rank, str(tmp_path))
    stage, model = make(**TINY, importance_samples=5)
    whole = stage.evaluate({"model": model}, [batch_of(7)])
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("latent", ["map", "vector"])
def test_samples_depend_on_their_own_seed_only(latent: str) -> None:
    stage, model = make(**TINY, latent=latent)
    nets, seeds = {"model": model}, torch.tensor([4, 9, 4, -1, 2**40])
    images = stage.sample_images(nets, seeds)
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8
    assert same_images(images[0], images[2]) and not same_images(images[0], images[1])
    for index in range(5):
        assert same_images(stage.sample_images(nets, seeds[index : index + 1])[0], images[index])
    assert same_images(stage.sample_images(nets, seeds.flip(0)), images.flip(0))
    z = normal_noise(seeds, 0, stage.config.latent_dimensions).view(5, *stage.config.latent_shape)
    assert same_images(stage.sample_images(nets, seeds, 0.7), to_bytes(stage.likelihood.mean(model.decoder(0.7 * z))))
    cold = stage.sample_images(nets, seeds, temperature=0.0)
    assert same_images(cold, cold[:1].expand_as(cold))
    with pytest.raises(UserError, match=r"temperature = -1\.0"):
        stage.sample_images(nets, seeds, -1.0)


@torch.no_grad()
def test_interpolation_runs_from_one_reconstruction_to_the_other() -> None:
    stage, model = make(**TINY)
    nets, a, b = {"model": model}, batch_of(2)["image"], batch_of(2, seed=1)["image"]
    paths = stage.interpolate(nets, a, b, 5)
    assert paths.shape == (2, 5, 3, 8, 8) and paths.dtype == torch.uint8
    for position, images in ((0, a), (4, b)):
        assert same_images(paths[:, position], to_bytes(stage.likelihood.mean(model(images)[0])))
    middle = (model(a)[1] + model(b)[1]) / 2
    difference = paths[:, 2].float() - to_bytes(stage.likelihood.mean(model.decoder(middle))).float()
    assert float(difference.abs().max()) <= 1
    with pytest.raises(UserError, match="steps = 1"):
        stage.interpolate(nets, a, b, 1)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 12])
def test_preview(count: int) -> None:
    stage, model = make(**TINY)
    batch = batch_of(count)
    images = stage.preview({"model": model}, batch)
    shown = min(count, 8)
    assert {name: tuple(value.shape) for name, value in images.items()} == {
        "reconstruction": (shown, 3, 16, 8),
        "samples": (8, 3, 8, 8),
        "interpolation": (8 * shown, 3, 8, 8),
    }
    assert all(value.dtype == torch.uint8 for value in images.values())
    assert torch.equal(images["reconstruction"][:, :, :8], batch["image"][:8])


def test_export_round_trip(tmp_path: Path) -> None:
    stage, model = make(**TINY)
    export.save(tmp_path / "export", "vae", stage.config, {"model": model.state_dict()})
    opened = export.load(tmp_path / "export")
    assert isinstance(opened.stage, Stage)
    seeds = torch.arange(3)
    assert torch.equal(opened.stage.sample_images(opened.nets, seeds), stage.sample_images({"model": model}, seeds))


@pytest.mark.parametrize("latent", ["map", "vector"])
def test_flops(latent: str) -> None:
    stage, _ = make(image_size=4, n_hid=4, multipliers=(1, 1), blocks_per_group=1, latent=latent, latent_channels=3)
    # By hand. A block 4 -> 4 is 1 wide inside; one block at 4x4 and one at 2x2, in the encoder and in the decoder.
    # Map or vector: a 1x1 convolution at 2x2 positions costs what a 2x2 convolution costs at one.
    block = 4 * 9 + 9 + 9 + 4 * 1
    encoder = 16 * (3 * 4 * 9 + block) + 4 * (block + 4 * 6)
    decoder = 4 * (3 * 4 + block) + 16 * (block + 4 * 6 * 9)
    assert stage.flops_per_sample() == 3 * 2 * (encoder + decoder)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"image_size": 30}, "multipliers = .*3 groups pool by 4, which does not divide image_size 30"),
        ({"multipliers": [1, 0]}, r"multipliers\.1 = 0"),
        ({"n_hid": 30}, "n_hid = 30: .*multiple of 4"),
        ({"likelihood": "l2"}, "likelihood = 'l2'"),
        ({"latent": "grid"}, "latent = 'grid'"),
        ({"gaussian_std": 0}, "gaussian_std = 0"),
        ({"free_bits_nats": -1}, "free_bits_nats = -1"),
        ({"free_bits": 1}, "unknown key 'free_bits'; did you mean 'free_bits_nats'"),
    ],
)
def test_bad_values_get_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_config.parse(Stage.Config, values, where="vae.yaml")
    assert "\n" not in str(caught.value)
