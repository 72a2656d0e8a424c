"""The VQGAN stage: both losses, who learns from whom and when, lambda against autograd, LeCam, tokenizer."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.batches import rows, same_codes
from torch import Tensor, nn

from dalle_scale import config as run_config
from dalle_scale.checkpoint import export
from dalle_scale.models.vqgan import Attention, Residual
from dalle_scale.models.vqvae import to_bytes, to_pixels
from dalle_scale.nn.lpips import build_lpips
from dalle_scale.nn.patchgan import MovingAverage
from dalle_scale.stages.vqgan import VQGAN, Discriminator, Stage, VQGANConfig
from dalle_scale.types import Batch, ImageTokenizer, Losses, Nets, UserError

TINY = {
    "image_size": 16,
    "width": 4,
    "multipliers": (1, 2),
    "blocks_per_group": 1,
    "norm_groups": 2,
    "dim": 4,
    "quantizer": {"vocab": 16},
    "perceptual": {"kind": "none"},
    "discriminator": {"width": 4, "layers": 2, "norm_groups": 2},
}


def make(**values: Any) -> tuple[Stage, Nets]:
    """Stage and nets with seeded weights."""
    torch.manual_seed(0)
    stage = Stage(run_config.parse(Stage.Config, {**TINY, **values}, where="test"))
    return stage, stage.nets()


def batch_of(count: int, seed: int = 0, size: int = 16) -> Batch:
    """Flat colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 200, (count, 3, 1, 1), generator=generator)
    images = (colours + torch.randint(0, 56, (count, 3, size, size), generator=generator)).to(torch.uint8)
    return {"image": images, "seed": torch.arange(count), "weight": torch.ones(count)}


def model_of(nets: Nets) -> VQGAN:
    model = nets["model"]
    assert isinstance(model, VQGAN)
    return model


def critic_of(nets: Nets) -> Discriminator:
    critic = nets["discriminator"]
    assert isinstance(critic, Discriminator)
    return critic


def made_by(nets: Nets, images: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and the quantizer's loss [B], without the stage."""
    model = model_of(nets)
    quantized = model.quantizer(model.encoder(to_pixels(images)))
    return model.decoder(quantized.values)[0], quantized.loss


def gradients(nets: Nets, net_name: str, losses: Losses) -> list[Tensor]:
    return list(torch.autograd.grad(losses.total, list(nets[net_name].parameters()), retain_graph=True))


def set_average(average: MovingAverage, *values: float) -> None:
    average.sums.copy_(torch.tensor(values))
    average.mass.fill_(1.0)


def test_paper_defaults() -> None:
    """72 M parameters, the size that others state for this architecture (LlamaGen's VQ-16)."""
    stage = Stage(VQGANConfig())
    assert stage.config.grid == 16 and stage.config.widths == (128, 128, 256, 256, 512)
    with torch.device("meta"):
        model = model_of(stage.nets())
        images, last, loss, codes = model(torch.empty(2, 3, 256, 256, dtype=torch.uint8))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [29_363_968, 42_515_587]
    assert images.shape == (2, 3, 256, 256) and last.shape == (2, 128, 256, 256)
    assert loss.shape == (2,) and codes.shape == (2, 16, 16)


@pytest.mark.parametrize("lecam_weight", [0.0, 0.3])
def test_losses_by_hand(lecam_weight: float) -> None:
    """With random perceptual features, a lambda and averages that are given."""
    stage, nets = make(perceptual={"kind": "random"}, perceptual_weight=0.5, lecam_weight=lecam_weight)
    set_average(critic_of(nets).gradient_norms, 3.0, 2.0)
    set_average(critic_of(nets).logits, 0.4, -0.2)
    batch, critic = batch_of(3), nets["discriminator"]
    made, commitment = made_by(nets, batch["image"])
    target = to_pixels(batch["image"])
    lpips = build_lpips(stage.config.perceptual)(made, target).mean()
    verdict = -critic(made).mean()
    want = F.l1_loss(made, target) + 0.5 * lpips + commitment.mean() + 0.8 * 3 / (2 + 1e-6) * verdict
    losses = stage.loss("model", nets, batch, 0)
    torch.testing.assert_close(losses.total, want, rtol=1e-5, atol=1e-6)
    for got, grad in zip(
        gradients(nets, "model", losses), torch.autograd.grad(want, list(nets["model"].parameters())), strict=True
    ):
        # sums over the places of 3 images, in any order, of numbers of the size of the largest gradient
        rounding = 3 * 16 * 16 * torch.finfo(torch.float32).eps * float(grad.abs().max())
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=rounding)
    assert set(losses.terms) == {"rec", "perceptual", "commitment", "gan", "lambda"}
    assert float(losses.terms["lambda"]) == pytest.approx(1.5)
    assert float(losses.terms["gan"]) == pytest.approx(verdict.item(), rel=1e-4)
    real, fake = critic(target), critic(made.detach())
    hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    pull = (real + 0.2).square().mean() + (fake - 0.4).square().mean()
    torch.testing.assert_close(
        stage.loss("discriminator", nets, batch, 0).total, hinge + lecam_weight * pull, rtol=1e-5, atol=1e-6
    )


def test_discriminator_trains_before_it_counts() -> None:
    """Update 3: it starts; step 5: the model hears of it."""
    stage, nets = make(discriminator_start=3, discriminator_warmup_steps=2, adaptive_weight=False)
    assert [stage.nets_to_update(step) for step in (0, 2)] == [("model",)] * 2
    assert [stage.nets_to_update(step) for step in (3, 4, 5, 99)] == [("model", "discriminator")] * 4
    batch, other = batch_of(4), copy.deepcopy(nets)
    for parameter in other["discriminator"].parameters():
        parameter.data.add_(0.1)
    for step in range(7):
        ours = stage.loss("model", nets, batch, step)
        theirs = stage.loss("model", {**nets, "discriminator": other["discriminator"]}, batch, step)
        pairs = zip(gradients(nets, "model", ours), gradients(nets, "model", theirs), strict=True)
        same = [torch.equal(one, another) for one, another in pairs]
        assert torch.equal(ours.total, theirs.total) == (step < 5) and all(same) == (step < 5)
        assert ("gan" in ours.terms) == (step >= 5) and ("lambda" in ours.terms) == (step >= 5)


@pytest.mark.parametrize("net_name", ["model", "discriminator"])
def test_the_resting_net_gets_no_gradient(net_name: str) -> None:
    """Frozen, as the loop hands it over, and even if it were not."""
    stage, nets = make(lecam_weight=0.1)
    other = "discriminator" if net_name == "model" else "model"
    for trains in (False, True):
        nets[other].requires_grad_(trains)
        stage.loss(net_name, nets, batch_of(2), 5).total.backward()
        assert all(parameter.grad is None for parameter in nets[other].parameters())
        assert all(parameter.grad is not None for parameter in nets[net_name].parameters())


@pytest.mark.parametrize("micro", [6, 3, 2])
def test_lambda_against_autograd(micro: int) -> None:
    """|gradient| of both parts at the weight of the last convolution, over the global batch whatever its parts are,
    and used from the next step on."""
    perceptual = {"kind": "random" if micro == 6 else "none"}  # VGG16 takes most of the time
    stage, nets = make(perceptual=perceptual, adaptive_decay=0.75)
    batch, model = batch_of(6), model_of(nets)
    lpips = build_lpips(stage.config.perceptual) if micro == 6 else None
    batch["weight"] = torch.tensor([1.5, 1.5, 0.0, 1.5, 1.5, 0.0])
    kept = batch["weight"] > 0
    want = []
    for step in range(3):
        images = to_pixels(batch["image"][kept])
        made, _ = made_by(nets, batch["image"][kept])
        likeness = F.l1_loss(made, images) + (lpips(made, images).mean() if lpips else 0.0)
        verdict = -nets["discriminator"](made).mean()
        weight = model.decoder.output.weight
        want.append([float(torch.autograd.grad(x, weight, retain_graph=True)[0].norm()) for x in (likeness, verdict)])
        shares = torch.tensor([0.75 ** (step - index) for index in range(step + 1)])
        norms = (shares[:, None] * torch.tensor(want)).sum(dim=0)
        terms = [stage.loss("model", nets, rows(batch, slice(i, i + micro)), step).terms for i in range(0, 6, micro)]
        if step == 0:
            assert {float(term["lambda"]) for term in terms} == {0.0}  # only measures
        stage.after_step(nets, step)
        next_lambda = float(stage.loss("model", nets, rows(batch, slice(0, 2)), step + 1).terms["lambda"])
        stage._gradients.clear()
        assert next_lambda == pytest.approx(float(norms[0] / norms[1]), rel=1e-3)
        with torch.no_grad():
            weight.mul_(1.3)


def test_lambda_is_bounded() -> None:
    """A discriminator that is flat gives no gradient: lambda ends at its limit, all stays finite."""
    stage, nets = make()
    critic = critic_of(nets)
    critic.head.weight.data.zero_()
    for step in range(3):
        losses = stage.loss("model", nets, batch_of(2), step)
        assert losses.total.isfinite() and all(g.isfinite().all() for g in gradients(nets, "model", losses))
        stage.after_step(nets, step)
    assert float(stage.loss("model", nets, batch_of(2), 3).terms["lambda"]) == 1e4


def test_lecam_starts_with_its_averages() -> None:
    """The first step measures; then the averages follow the mean logits of the steps."""
    stage, nets = make(lecam_weight=1.0, lecam_decay=0.5)
    batch = batch_of(4)
    first = stage.loss("discriminator", nets, batch, 0)
    assert float(first.terms["lecam"]) == 0
    stage.after_step(nets, 0)
    averages = critic_of(nets).logits.value()
    assert averages.tolist() == pytest.approx([float(first.terms["real"]), float(first.terms["fake"])], rel=1e-5)
    with torch.no_grad():
        stage.loss("discriminator", nets, batch_of(4, seed=1), 1)  # validation
    stage.after_step(nets, 1)
    assert torch.equal(critic_of(nets).logits.value(), averages)
    second = stage.loss("discriminator", nets, batch, 1)
    assert float(second.terms["lecam"]) > 0


def test_discriminators_loss_is_a_mean_over_samples() -> None:
    stage, nets = make(lecam_weight=0.5)
    set_average(critic_of(nets).logits, 0.4, -0.2)
    batch = batch_of(6)
    whole = stage.loss("discriminator", nets, batch, 3)
    halves = [stage.loss("discriminator", nets, rows(batch, part), 3) for part in (slice(3), slice(3, 6))]
    for name in whole.terms:
        mean = sum(float(half.terms[name]) for half in halves) / 2
        assert float(whole.terms[name]) == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert whole.total.item() == pytest.approx(sum(half.total.item() for half in halves) / 2, rel=1e-5)
    batch["weight"] = torch.tensor([2.0, 2, 2, 0, 0, 0])
    assert stage.loss("discriminator", nets, batch, 3).total.item() == pytest.approx(halves[0].total.item(), rel=1e-5)


def test_the_codebook_counts_a_batch_once() -> None:
    """In the model's turn, not in the discriminator's, which runs the model too, nor in validation."""
    stage, nets = make(quantizer={"vocab": 16, "ema_decay": 0.0})
    other_stage, other = make(quantizer={"vocab": 16, "ema_decay": 0.0})
    batch = batch_of(4)
    nets["model"].requires_grad_(False)
    stage.loss("discriminator", nets, batch, 0)
    nets["model"].requires_grad_(True)
    with torch.no_grad():
        stage.loss("model", nets, batch, 0)
    stage.loss("model", nets, batch, 0)
    other_stage.loss("model", other, batch, 0)
    stage.after_step(nets, 0)
    other_stage.after_step(other, 0)
    codebooks = [model_of(each).quantizer.codebook for each in (nets, other)]
    assert torch.equal(*codebooks) and not torch.equal(codebooks[0], model_of(make()[1]).quantizer.codebook)


def test_training_lowers_the_loss_with_both_players() -> None:
    stage, nets = make(lecam_weight=0.1, discriminator_warmup_steps=4, quantizer={"vocab": 16, "restart_below": 0.1})
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.5, 0.9)) for name, net in nets.items()}
    history = []
    for step in range(24):
        for net_name in stage.nets_to_update(step):
            losses = stage.loss(net_name, nets, batch_of(8), step)
            optimizers[net_name].zero_grad()
            losses.total.backward()
            optimizers[net_name].step()
            history += [float(losses.terms["rec"])] if net_name == "model" else []
        stage.after_step(nets, step)
    # Two nets do not stay where they are lowest, and where they jump depends on the CPU's rounding
    assert statistics.median(history[-5:]) < 0.6 * history[0]


def test_kmeans_start() -> None:
    """Codes start among the features: more of them are in use than of codes around zero."""
    used = {}
    for init in ("random", "kmeans"):
        stage, nets = make(quantizer={"vocab": 16, "init": init, "init_samples": 12})
        stage.initialize(nets, iter([batch_of(8), batch_of(8, seed=1)]))
        used[init] = stage.evaluate(nets, [batch_of(8)])["codes_used"]
    assert used["kmeans"] > 0.6 and used["kmeans"] > used["random"]


def test_weights_of_the_perceptual_loss_are_needed_only_for_training(tmp_path: Path) -> None:
    """An export opens where the files are not; training says which one is missing."""
    files = {"kind": "lpips", "vgg": str(tmp_path / "vgg.pth"), "heads": str(tmp_path / "heads.pth")}
    stage, nets = make(perceptual=files)
    export.save(tmp_path / "export", "vqgan", stage.config, {name: net.state_dict() for name, net in nets.items()})
    opened = export.load(tmp_path / "export")
    assert not any("features" in name for net in opened.nets.values() for name in net.state_dict())
    assert stage.flops_per_sample() > 0
    with pytest.raises(UserError, match=r"vgg\.pth: no such file"):
        stage.loss("model", nets, batch_of(2), 0)


def test_tokenizer_and_export(tmp_path: Path) -> None:
    stage, nets = make()
    batch = batch_of(5)
    tokenizer = stage.tokenizer(nets)
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.vocab, tokenizer.grids, tokenizer.image_size) == (16, (8,), 16)
    codes = tokenizer.encode(batch["image"])
    assert codes.shape == (5, 64) and codes.dtype == torch.int64
    images, _, _, squares = nets["model"](batch["image"])
    assert torch.equal(codes, squares.flatten(1))  # raster order
    decoded = tokenizer.decode(codes.to(torch.int32))
    assert decoded.dtype == torch.uint8 and not decoded.requires_grad
    assert int((decoded.int() - to_bytes(images).int()).abs().max()) <= 1
    assert tokenizer.decode_grid(torch.cat([squares] * 2, dim=1)).shape == (5, 3, 32, 16), "twice as many rows"
    export.save(tmp_path / "export", "vqgan", stage.config, {name: net.state_dict() for name, net in nets.items()})
    assert torch.equal(export.open_tokenizer(tmp_path / "export").encode(batch["image"]), codes)


def test_tokenizer_takes_any_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, nets = make()
    whole = stage.tokenizer(nets).encode(batch_of(5)["image"])
    monkeypatch.setattr("dalle_scale.stages.vqgan.Stage.pixels_at_once", 2 * 16 * 16 + 5)
    parts = stage.tokenizer(nets)
    assert same_codes(parts.encode(batch_of(5)["image"]), whole) and parts.decode(whole).shape == (5, 3, 16, 16)


def test_evaluate_and_preview() -> None:
    stage, nets = make()
    batch = batch_of(10)
    parts = [rows(batch, slice(0, 4)), rows(batch, slice(4, 10))]
    result = stage.evaluate(nets, parts)
    outputs = [nets["model"](part["image"]) for part in parts]  # as evaluated: rounding may choose another code
    images, codes = torch.cat([output[0] for output in outputs]), torch.cat([output[3] for output in outputs])
    pixels = ((images + 1) * 127.5).clamp(0, 255)
    mse = float((pixels - batch["image"]).square().mean())
    assert result["psnr_db"] == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-4)
    assert result["codes_used"] == len(codes.unique()) / 16
    (shown,) = stage.preview(nets, batch).values()
    assert shown.shape == (8, 3, 32, 16) and torch.equal(shown[:, :, :16], batch["image"][:8])
    assert torch.equal(shown[:, :, 16:], to_bytes(nets["model"](batch["image"][:8])[0]))


def test_usage_is_logged_at_its_cadence() -> None:
    stage, nets = make(usage_every=2)
    for step in range(4):
        stage.loss("model", nets, batch_of(4, seed=step), step)
        values = stage.after_step(nets, step)
        assert set(values) == ({"codes_used", "perplexity", "psnr_db"} if step % 2 else set())


def test_attention_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = Attention(4, groups=2), torch.randn(2, 4, 3, 5)
    flat = F.group_norm(x, 2, eps=1e-6).flatten(2)
    weight, bias = layer.qkv.weight[:, :, 0, 0], layer.qkv.bias
    assert bias is not None
    query, key, value = (torch.einsum("oc,bcn->bon", weight, flat) + bias[:, None]).chunk(3, dim=1)
    seen = torch.einsum("bij,bcj->bci", (torch.einsum("bci,bcj->bij", query, key) / 2).softmax(dim=-1), value)
    want = x + layer.output(seen.view_as(x))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_change_nothing() -> None:
    stage, nets = make()
    losses = stage.loss("model", nets, batch_of(2), 0)
    want = gradients(nets, "model", losses)
    assert sum(isinstance(module, Residual) for module in nets["model"].modules()) == 10
    for module in nets["model"].modules():
        if hasattr(module, "activation_checkpointing"):
            module.activation_checkpointing = True
    again = stage.loss("model", nets, batch_of(2), 0)
    again.total.backward()
    for parameter, gradient in zip(nets["model"].parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_flops_by_hooks() -> None:
    """Convolutions counted as they run; attention is two products of positions^2 x channels."""
    stage, nets = make()
    counted = dict.fromkeys(nets, 0)

    def count(net: str, layer: nn.Module, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            counted[net] += 2 * output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, Attention):
            positions = output[0, 0].numel()
            counted[net] += 2 * 2 * positions**2 * output.shape[1]

    for name, net in nets.items():
        for layer in net.modules():
            layer.register_forward_hook(lambda layer, _, output, name=name: count(name, layer, output))
    made = nets["model"](batch_of(1)["image"])[0]
    nets["discriminator"](made)
    distances = 2 * 64 * 16 * 4  # vectors x codes x dim
    total = 4 * (counted["model"] + distances) + 8 * counted["discriminator"]
    assert stage.flops_per_sample() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 17}, "image_size 17 cannot be halved 1 times"),
        ({"width": 5}, r"norm_groups 2 must divide the widths \(5, 10\)"),
        ({"multipliers": [0, 1]}, r"multipliers\.0 = 0: .*greater than 0"),
        ({"image_size": 8}, "discriminator.layers 2 need images of 12 pixels"),
        ({"discriminator": {"width": 4, "norm": "batch"}}, "discriminator.norm = 'batch'"),
        ({"discriminator": {"width": 3}}, "norm_groups 32 must divide 2 x width = 6"),
        ({"image_size": 12, "perceptual": {"kind": "random"}}, "perceptual.kind random needs 16 pixels"),
        ({"perceptual": {"kind": "lpips"}}, "lpips needs the files vgg and heads"),
        ({"gan_loss": "wasserstein"}, "gan_loss = 'wasserstein'"),
        ({"discriminator_strat": 1}, "unknown key 'discriminator_strat'; did you mean 'discriminator_start'"),
    ],
)
def test_bad_values_get_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_config.parse(Stage.Config, {**TINY, **values}, where="vqgan.yaml")
    assert "\n" not in str(caught.value)
