"""The diffusion stage: loss by its definition, invariances, bound, sampling, captions, latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle_scale import config as run_config
from dalle_scale.checkpoint import export
from dalle_scale.models.diffusion.process import to_map
from dalle_scale.models.diffusion.samplers import Options
from dalle_scale.models.latent_codec import Latents
from dalle_scale.nn.counter_rng import normal_noise, uniform_noise
from dalle_scale.stages import vae
from dalle_scale.stages.ddpm import Stage
from dalle_scale.types import Batch, ImageSampler, Nets, UserError

TINY: dict[str, Any] = {
    "image_size": 4,
    "width": 16,
    "multipliers": (1,),
    "blocks": 1,
    "attention_sizes": (),
    "timesteps": 12,
    "schedule": "cosine",
    "dropout": 0.0,
}
TEXT: dict[str, Any] = {"text_length": 3, "text_vocab": 20}


def make(fresh: bool = False, **changes: Any) -> tuple[Stage, Nets]:
    """Stage and nets; unless `fresh`, with weights that are nowhere zero."""
    torch.manual_seed(0)
    stage = Stage(run_config.parse(Stage.Config, {**TINY, **changes}, where="test"))
    nets = stage.nets()
    if not fresh:
        for parameter in nets["model"].parameters():
            nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.2)
    return stage, nets


def batch_of(count: int, size: int = 4, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(256, (count, 3, size, size), generator=generator).to(torch.uint8)
    seeds = torch.randint(1 << 62, (count,), generator=generator)
    text = torch.randint(20, (count, 3), generator=generator)
    return {"image": images, "seed": seeds, "text": text, "weight": torch.ones(count)}


def rows(batch: Batch, index: slice | list[int]) -> Batch:
    return {key: value[index] for key, value in batch.items()}


@pytest.mark.parametrize("antithetic", [False, True])
def test_starts_near_one(antithetic: bool) -> None:
    stage, nets = make(fresh=True, antithetic=antithetic)
    losses = stage.loss("model", nets, batch_of(256), step=0)
    values = 256 * 48 * (1 + antithetic)
    assert float(losses.total.detach()) == pytest.approx(1, abs=5 * math.sqrt(2 / values))


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_loss_by_the_definition(target: str, antithetic: bool) -> None:
    stage, nets = make(target=target, antithetic=antithetic)
    batch, step = batch_of(3), 5
    batch["weight"] = torch.tensor([1.5, 1.5, 0.0])
    total = 0.0
    for index in range(2):
        one = rows(batch, [index])
        u = float(uniform_noise(one["seed"], 3 * step + 1, 2)[0, 0])
        time = int(u * 12)
        pairs = [(time, one["seed"])] + ([(11 - time, -1 - one["seed"])] if antithetic else [])
        for t, seed in pairs:
            noise = normal_noise(seed, 3 * step, 48).view(1, 3, 4, 4)
            level, x0 = float(stage.diffusion.alphas_cumprod[t]), one["image"].float() / 127.5 - 1
            x = math.sqrt(level) * x0 + math.sqrt(1 - level) * noise
            v = math.sqrt(level) * noise - math.sqrt(1 - level) * x0
            wanted = {"eps": noise, "x0": x0, "v": v}[target]
            with torch.no_grad():
                error = nets["model"](x, torch.tensor([t])) - wanted
            total += 1.5 / 3 * float(error.square().mean()) / len(pairs)
    losses = stage.loss("model", nets, batch, step)
    assert float(losses.total.detach()) == pytest.approx(total, rel=1e-4)
    quarters = [float(losses.terms[f"quarter_{number}"]) for number in range(1, 5)]
    assert sum(quarters) / 4 == pytest.approx(float(losses.terms["mse"]), rel=1e-5)


def test_quarters_are_means_over_their_times() -> None:
    stage, _ = make(timesteps=10)  # does not divide: quarters of 3, 2, 3 and 2 times
    times = torch.arange(10)
    found = stage._by_quarter(times.float(), times, torch.ones(10))
    assert [float(found[f"quarter_{number}"]) for number in range(1, 5)] == pytest.approx([1, 3.5, 6, 8.5])


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_a_sample_does_not_depend_on_its_batch(variance: str) -> None:
    """With dropout, captions left out, and pairs of times."""
    stage, nets = make(variance=variance, antithetic=True, dropout=0.3, caption_dropout=0.5, **TEXT)
    batch = batch_of(6)
    whole = stage.loss("model", nets, batch, step=2)
    parts = [stage.loss("model", nets, rows(batch, part), step=2) for part in (slice(2), slice(2, 6))]
    for name, value in whole.terms.items():
        expected = (2 * parts[0].terms[name] + 4 * parts[1].terms[name]) / 6
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(whole.total, stage.loss("model", nets, batch, step=3).total)
    nets["model"].eval()  # in validation the step number changes nothing, and nothing is left out
    first, second = (stage.loss("model", nets, batch, step) for step in (2, 3))
    assert torch.equal(first.total, second.total)


def test_pairs_of_times_steady_the_loss() -> None:
    """Against as many evaluations of the net on twice as many images; a fresh net's loss of v depends on the time."""
    spread = {}
    for antithetic in (False, True):
        stage, nets = make(fresh=True, target="v", timesteps=1000, antithetic=antithetic)
        count = 8 if antithetic else 16
        with torch.no_grad():
            losses = [float(stage.loss("model", nets, batch_of(count, first=n), step=n).total) for n in range(40)]
        spread[antithetic] = torch.tensor(losses).var()
    assert spread[True] < 0.3 * spread[False]


def test_the_bound_trains_the_variance_alone() -> None:
    stage, nets = make(variance="learned")
    model, batch = nets["model"], batch_of(8)
    losses = stage.loss("model", nets, batch, step=1)
    expected = losses.terms["mse"] + 0.001 * losses.terms["bound"]
    torch.testing.assert_close(losses.total.detach(), expected)
    losses.total.backward()
    mean_grad, variance_grad = model.output.bias.grad.chunk(2)  # type: ignore[union-attr, operator]
    assert variance_grad.any()
    model.zero_grad()
    number, seeds, x0 = 3, batch["seed"], to_map(batch["image"])
    times = (uniform_noise(seeds, number + 1, 2)[:, 0].double() * 12).long()
    noise = normal_noise(seeds, number, 48).view_as(x0)
    out = model(stage.diffusion.noisy(x0, times, noise), times)[:, :3]
    (out - noise).square().mean().backward()
    torch.testing.assert_close(mean_grad, model.output.bias.grad[:3], rtol=1e-4, atol=1e-6)  # type: ignore[index]


def test_bound_term_is_the_mean_of_what_evaluate_adds_up() -> None:
    """L_vlb of training over all times is the bound without L_T, where x0 stays within its range."""
    stage, nets = make(fresh=True, variance="learned", target="x0", timesteps=2)
    nets["model"].eval()
    with torch.no_grad():
        nets["model"].output.bias.fill_(0.1)  # type: ignore[union-attr]
    batch = batch_of(1)
    copies = {key: value.expand(1500, *value.shape[1:]) for key, value in batch.items()}
    copies["seed"] = torch.randint(1 << 62, (1500,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        bound = float(stage.loss("model", nets, copies, step=0).terms["bound"])
    found = stage.evaluate(nets, [rows(copies, slice(100))])
    prior = float(stage.diffusion.prior_bits(to_map(batch["image"])))
    assert bound == pytest.approx(found["elbo_bits_per_dim"] - prior, rel=0.05)


def test_evaluate() -> None:
    stage, nets = make(variance="learned", caption_dropout=0.1, **TEXT)
    nets["model"].eval()
    batch = batch_of(4)
    batch["weight"] = torch.tensor([1.0, 2.0, 1.0, 0.0])
    whole = stage.evaluate(nets, [batch])
    halves = stage.evaluate(nets, [rows(batch, [1, 3]), rows(batch, [0, 2])])
    assert set(whole) == {"elbo_bits_per_dim", "rate_bits_per_dim", "distortion_bits_per_dim"}
    assert whole == pytest.approx(halves, rel=1e-5)
    assert whole["elbo_bits_per_dim"] == pytest.approx(whole["rate_bits_per_dim"] + whole["distortion_bits_per_dim"])
    estimate = stage.evaluate(nets, [batch], bound_timesteps=2)
    assert set(estimate) == {
        "elbo_bits_per_dim_estimate",
        "rate_bits_per_dim_estimate",
        "distortion_bits_per_dim",
    }
    assert estimate["distortion_bits_per_dim"] == whole["distortion_bits_per_dim"]
    del batch["text"]
    assert stage.evaluate(nets, [batch]) != whole  # without captions: the empty one


def test_a_image_depends_on_its_seed_alone() -> None:
    stage, nets = make(variance="learned")
    assert isinstance(stage.sampler(nets), ImageSampler)
    nets["model"].eval()
    seeds = torch.tensor([3, 4, 1 << 50])
    images = stage.sample_images(nets, seeds)
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 4, 4)
    again = stage.sample_images(nets, seeds[[2, 0]])
    assert int((again.int() - images[[2, 0]].int()).abs().max()) <= 1
    assert not torch.equal(images[0], images[1])


def test_config_says_how_images_are_drawn() -> None:
    seeds = torch.arange(2)
    stage, nets = make(sampler="ddim", sampling_steps=4)
    by_options = stage.sample_images(nets, seeds, options=Options(method="ddim", steps=4))
    assert torch.equal(stage.sample_images(nets, seeds), by_options)
    assert not torch.equal(stage.sample_images(nets, seeds, options=Options(method="ancestral", steps=12)), by_options)
    small, _ = make(variance="fixed_small")  # is that of the sampling as well
    sampled = small.sample_images(nets, seeds)
    assert torch.equal(
        sampled, stage.sample_images(nets, seeds, options=Options(method="ancestral", steps=12, variance="fixed_small"))
    )
    assert not torch.equal(
        sampled, stage.sample_images(nets, seeds, options=Options(method="ancestral", steps=12, variance="fixed_large"))
    )


def test_captions_and_guidance() -> None:
    stage, nets = make(target="x0", caption_dropout=0.1, **TEXT)
    nets["model"].eval()
    with torch.no_grad():
        nets["model"].caption.contract.weight.mul_(30)  # type: ignore[union-attr, operator]
    seeds, text, empty = torch.arange(3), batch_of(3)["text"], stage.empty_caption().expand(3, -1)

    def sampled(text: Tensor | None, guidance: float = 1.0) -> Tensor:
        options = Options(method="ddim", steps=4, guidance=guidance)
        return stage.sample_images(nets, seeds, text=text, options=options).float()

    assert torch.equal(sampled(None), sampled(empty)) and not torch.equal(sampled(text), sampled(empty))
    assert float((sampled(text, 0.0) - sampled(empty)).abs().max()) <= 1
    assert not torch.equal(sampled(text, 3.0), sampled(text))
    assert stage.preview(nets, batch_of(3))["samples"].shape == (3, 3, 4, 4)


def test_captions_are_left_out_at_their_share() -> None:
    stage, nets = make(caption_dropout=0.3, **TEXT)
    seen: list[Tensor] = []
    nets["model"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    batch = batch_of(1000)
    with torch.no_grad():
        stage.loss("model", nets, batch, step=1)
    empty = (seen[0] == stage.empty_caption()).all(dim=1)
    assert float(empty.float().mean()) == pytest.approx(0.3, abs=0.06)
    assert torch.equal(seen[0][~empty], batch["text"][~empty])


def test_learns() -> None:
    """Images of one value each: soon cheaper than not knowing them."""
    stage, nets = make(fresh=True, target="v")
    optimiser = torch.optim.Adam(nets["model"].parameters(), lr=3e-3)
    batch = batch_of(16)
    batch["image"] = batch["image"][:, :1, :1, :1].expand(-1, 3, 4, 4).contiguous()
    losses = []
    for step in range(60):
        loss = stage.loss("model", nets, batch, step).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_flops_count_both_times_of_a_pair() -> None:
    assert make(antithetic=True)[0].flops_per_sample() == 2 * make()[0].flops_per_sample() > 0


def encoder() -> tuple[Latents, vae.Stage]:
    """A VAE with fresh weights."""
    torch.manual_seed(1)
    sizes = {"image_size": 16, "n_hid": 8, "multipliers": (1, 1, 1), "blocks_per_group": 1, "latent_channels": 2}
    stage = vae.Stage(run_config.parse(vae.Stage.Config, sizes, where="test"))
    model = stage.nets()["model"]
    assert isinstance(model, vae.VAE)

    return stage.latents({"model": model}), stage


LATENT: dict[str, Any] = {**TINY, "image_size": 16, "latent_channels": 2, "latent_size": 4, "latent_scale": 2.0}


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_latents(variance: str) -> None:
    latents, _ = encoder()
    stage = Stage(run_config.parse(Stage.Config, {**LATENT, "variance": variance}, where="test"), latents)  # type: ignore[arg-type]
    nets, batch = stage.nets(), batch_of(3, size=16)
    assert stage.inputs.keys == ("image",) and stage.inputs.image_size == 16
    losses = stage.loss("model", nets, batch, step=0)
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad is not None for p in nets["model"].parameters())
    encoded = latents.encode(batch["image"])
    torch.testing.assert_close(stage.maps(nets["model"], batch["image"]), 2 * encoded)
    assert int((stage.images(nets["model"], 2 * encoded).int() - latents.decode(encoded).int()).abs().max()) <= 1
    assert stage.sample_images(nets, torch.arange(3)).shape == (3, 3, 16, 16)
    with pytest.raises(UserError, match="this model has latents"):
        stage.evaluate(nets, [batch])


def test_the_scale_of_latents_is_measured(tmp_path: Path) -> None:
    latents, below = encoder()
    unknown = {**LATENT, "latent_scale": None}
    stage = Stage(run_config.parse(Stage.Config, unknown, where="test"), latents)  # type: ignore[arg-type]
    nets, batches = stage.nets(), [batch_of(4, size=16), batch_of(3, size=16, first=9)]
    batches[1]["weight"][2] = 0
    assert not stage.loss("model", nets, batches[0], step=0).total.isfinite(), "used before it is measured"
    stage.initialize(nets, iter(batches))
    images = torch.cat([batches[0]["image"], batches[1]["image"][:2]])
    maps = stage.maps(nets["model"], images)
    assert float(maps.std()) == pytest.approx(1) and stage.loss("model", nets, batches[0], step=0).total.isfinite()
    export.save(tmp_path / "vae", "vae", below.config, {"model": latents._net.state_dict()})
    state = {"model": nets["model"].state_dict()}
    export.save(tmp_path / "ddpm", "ddpm", stage.config, state, {"tokenizer": tmp_path / "vae"})
    again = export.load(tmp_path / "ddpm")
    assert torch.equal(again.stage.maps(again.nets["model"], images), maps)


def test_an_export_of_latents_holds_its_vae(tmp_path: Path) -> None:
    """Saved with the VAE's export as a part, opened again: the same images. A tokenizer of codes is refused."""
    latents, below = encoder()
    export.save(tmp_path / "vae", "vae", below.config, {"model": latents._net.state_dict()})
    opened = export.open_upstream(tmp_path / "vae", Stage)
    images = batch_of(3, size=16)["image"]
    assert torch.equal(opened.encode(images), latents.encode(images))
    stage = Stage(run_config.parse(Stage.Config, LATENT, where="test"), opened)
    nets = stage.nets()
    state = {"model": nets["model"].state_dict()}
    export.save(tmp_path / "ddpm", "ddpm", stage.config, state, {"tokenizer": tmp_path / "vae"})
    again = export.load(tmp_path / "ddpm")
    assert isinstance(again.stage, Stage)
    nets["model"].eval()
    assert torch.equal(
        again.stage.sample_images(again.nets, torch.arange(2)), stage.sample_images(nets, torch.arange(2))
    )
    with pytest.raises(UserError, match="stage 'ddpm' has no continuous latents; give the export of a VAE"):
        export.open_upstream(tmp_path / "ddpm", Stage)


def test_an_encoder_must_fit() -> None:
    latents, _ = encoder()

    def build(upstream: Any, **changes: Any) -> Stage:
        return Stage(run_config.parse(Stage.Config, {**LATENT, **changes}, where="test"), upstream)

    with pytest.raises(UserError, match=r"model\.latent_channels: 3, but the encoder has 2"):
        build(latents, latent_channels=3)
    with pytest.raises(UserError, match=r"model\.image_size: 32"):
        build(latents, image_size=32)
    with pytest.raises(UserError, match="has codes, not latents"):
        build(object())
    with pytest.raises(UserError, match="one of pixels"):
        build(latents, latent_channels=0, latent_size=0)
    with pytest.raises(UserError, match="there is no encoder"):
        stage = build(None)
        stage.loss("model", stage.nets(), batch_of(1, size=16), step=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 144}, "width = 144.*multiple of 4, above 128 of 32"),
        ({"width": 18}, "width = 18.*multiple of 4"),
        ({"multipliers": (1, 2, 2, 2)}, "halve 3 times, which 4 cannot"),
        ({"multipliers": (0,)}, "must be 1 or more"),
        ({"attention_sizes": (16,)}, "the net has the sides 4"),
        ({"schedule": "linear"}, "needs more than 20 timesteps"),
        ({"text_length": 4}, "text_length and text_vocab together"),
        ({"latent_channels": 4}, "latent_channels and latent_size together"),
    ],
)
def test_wrong_config_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_what_sampling_does_not_take() -> None:
    stage, nets = make()
    for how, message in (
        ({"options": Options(guidance=2.0)}, "without caption_dropout"),
        ({"options": Options(steps=13)}, "has 12 times"),
        ({"options": Options(variance="learned")}, "learned none"),
    ):
        with pytest.raises(UserError, match=message):
            stage.sample_images(nets, torch.arange(1), **how)  # type: ignore[arg-type]
