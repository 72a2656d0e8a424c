"""From a folder to images: the exported model with its tokenizers, and the program around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from support.exports import export_stage
from support.processes import ROOT

from dalle_scale.checkpoint import export
from dalle_scale.evaluation.result_schema import MADE_BY
from dalle_scale.io import digest
from dalle_scale.models.diffusion import samplers
from dalle_scale.nn import precision, residual_scaling
from dalle_scale.sampling import batch_size
from dalle_scale.sampling.sampler import Sampler, candidate_seed
from dalle_scale.types import UserError

PROGRAM = ROOT / "launch" / "sample.py"
PROMPTS = ["a red circle", "a blue square above a circle", "two circles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of a small dalle model with both tokenizers."""
    root = tmp_path_factory.mktemp("exports")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 20),
        model_prefix=str(root / "text"),
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = export_stage(
        root / "dvae", "dvae", {}, image_size=16, downsampling=4, vocab=12, stem="patch", n_hid=8, multipliers=(1,)
    )
    parts = {"text_tokenizer": root / "text.model", "tokenizer": tokenizer}
    sizes = {"text_vocab": 48, "text_length": 8, "image_vocab": 12, "grid": 4, "width": 16, "layers": 2, "heads": 2}
    return export_stage(root / "dalle", "dalle", parts, **sizes, conv_kernel=3)


def collect(batches):
    """{(prompt, candidate): (seed, image)} of all batches."""
    return {
        (index, candidate): (seed, image)
        for batch in batches
        for index, candidate, seed, image in zip(
            batch.prompt_index, batch.candidate, batch.seed, batch.images, strict=True
        )
    }


def test_every_candidate_of_every_prompt_once(folder):
    sampler = Sampler([folder])
    batches = list(sampler.sample(PROMPTS, candidates=4, seed=3, images_per_batch=5))
    assert [len(batch.images) for batch in batches] == [5, 5, 2]
    sampled = collect(batches)
    assert sorted(sampled) == [(prompt, candidate) for prompt in range(3) for candidate in range(4)]
    for (prompt, candidate), (seed, image) in sampled.items():
        assert seed == candidate_seed(3, PROMPTS[prompt], candidate)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_draw_nearly_the_same(folder, dtype):
    """The first code of all is chosen by nearly the same logits; the matrices and what is kept of them are short."""
    exact, short = Sampler([folder]), Sampler([folder], dtype=dtype)
    assert short.record(short.options())["dtype"] == dtype and exact.record(exact.options())["dtype"] == "fp32"
    nets = [sampler.models[0].nets["model"] for sampler in (exact, short)]
    assert nets[1].blocks[0].attention.query.weight.dtype == residual_scaling.HALF_TYPES[dtype]
    assert nets[1].image_head.weight.dtype == torch.float32
    text, prefix_index = exact.text.encode(PROMPTS, 8), torch.arange(3)
    with torch.inference_mode():
        want, got = (net.prefill(text, prefix_index)[0] for net in nets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.std().item())
    assert len(next(short.sample(PROMPTS, 2, 0)).images) == 6


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_auto_is_recorded(folder, monkeypatch, dtype):
    monkeypatch.setattr(precision, "choose", lambda nets, device: precision.Choice(dtype, ""))
    auto = Sampler([folder], dtype="auto")
    assert auto.record(auto.options())["dtype"] == dtype
    assert auto.models[0].nets["model"].blocks[0].expand.weight.dtype == precision.TYPES[dtype]


def test_16_bits_are_for_transformers(tmp_path):
    vae = export_stage(tmp_path / "vae", "vae", {}, image_size=16, n_hid=8, multipliers=(1, 1))
    assert Sampler([vae], dtype="auto").dtype == "fp32"
    with pytest.raises(UserError, match="dtype: bf16, but only"):
        Sampler([vae], dtype="bf16")


def test_batches_are_as_good_as_equal(folder, monkeypatch):
    sampler = Sampler([folder])
    monkeypatch.setattr(batch_size, "images_per_batch", lambda *_: 5)
    sizes = [len(batch.seed) for batch in sampler.batches(PROMPTS, [(0, number) for number in range(12)], 0)]
    assert sizes == [4, 4, 4]


def test_images_depend_on_prompt_and_seed_only(folder):
    """Not on batch size, on other prompts, or on how many candidates there are."""
    sampler = Sampler([folder])
    sampled = collect(sampler.sample(PROMPTS, candidates=4, seed=3, options=sampler.options(guidance=2.0)))
    again = collect(
        sampler.sample(PROMPTS[:0:-1], candidates=2, seed=3, options=sampler.options(guidance=2.0), images_per_batch=1)
    )
    for (prompt, candidate), (seed, image) in again.items():
        expected_seed, expected = sampled[2 - prompt, candidate]
        assert seed == expected_seed and torch.equal(image, expected)
    other = collect(sampler.sample(PROMPTS, candidates=1, seed=4, options=sampler.options(guidance=2.0)))
    assert any(not torch.equal(other[index, 0][1], sampled[index, 0][1]) for index in range(3))


def test_images_are_the_stages_codes_decoded(folder):
    sampler = Sampler([folder])
    [batch] = sampler.sample(PROMPTS[:1], candidates=3, seed=0, options=sampler.options(top_k=5))
    text = sampler.text.encode(PROMPTS[:1] * 3, 8)
    codes = sampler.stage.sample(sampler.models[0].nets, text, torch.tensor(batch.seed), top_k=5)
    assert torch.equal(batch.images, export.open_tokenizer(folder.parent / "dvae").decode(codes))


def test_candidate_seeds_are_distinct_and_fit_int64():
    seeds = {
        candidate_seed(seed, prompt, candidate) for seed in range(4) for prompt in PROMPTS for candidate in range(50)
    }
    assert len(seeds) == 600 and min(seeds) >= 0 and max(seeds) < 2**63
    assert candidate_seed(1, "a", 11) != candidate_seed(11, "a", 1)


def test_prime_keeps_the_top_of_a_image(folder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "prime.png")
    sampler = Sampler([folder])
    prime = sampler.prime_codes(tmp_path / "prime.png", rows=2)
    whole = sampler.image_tokenizer.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert torch.equal(prime, whole[0, :8])
    [everything] = sampler.sample(PROMPTS[:1], 2, 0, prime=whole[0])
    assert torch.equal(everything.images, sampler.image_tokenizer.decode(whole).expand(2, -1, -1, -1))
    [batch] = sampler.sample(PROMPTS[:1], 2, 0, prime=prime)
    assert not torch.equal(batch.images[0], batch.images[1])


def test_prime_that_cannot_be(folder, tmp_path):
    sampler = Sampler([folder])
    with pytest.raises(UserError, match="prime rows: 5, but images have 4 rows"):
        sampler.prime_codes(tmp_path / "x.png", rows=5)
    with pytest.raises(UserError, match=r"x\.png"):
        sampler.prime_codes(tmp_path / "x.png", rows=1)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png.*decode"):
        sampler.prime_codes(tmp_path / "x.png", rows=1)


def test_without_captions(folder, tmp_path):
    """A transformer of codes alone needs no text tokenizer and no prompts; the program samples --candidates images."""
    sizes = {"text_length": 0, "image_vocab": 12, "grid": 4, "width": 16, "layers": 2, "heads": 2, "conv_kernel": 3}
    export_stage(tmp_path / "codes", "dalle", {"tokenizer": folder / "tokenizer"}, **sizes)
    line = [sys.executable, str(PROGRAM), "--model", str(tmp_path / "codes"), "--out", str(tmp_path / "out")]
    result = subprocess.run([*line, "--candidates=3"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    sampler = Sampler([tmp_path / "codes"])
    [batch] = sampler.sample([""], 3, seed=0)
    for candidate, image in enumerate(batch.images):
        written = np.asarray(Image.open(tmp_path / "out" / "images" / f"00000_{candidate:04d}.png"))
        assert np.array_equal(written, image.permute(1, 2, 0).numpy())
    assert len({image.numpy().tobytes() for image in batch.images}) == 3
    with pytest.raises(UserError, match="trained without captions"):
        sampler.sample(["a dog"], 1, seed=0)


def test_larger_images(folder, tmp_path):
    """More rows and columns of codes than in training; at the model's own size it is the plain sample."""
    sampler = Sampler([folder])
    [own] = sampler.sample(PROMPTS[:2], 1, 5, sampler.options(size=(4, 4)))
    [plain] = sampler.sample(PROMPTS[:2], 1, 5)
    assert torch.equal(own.images, plain.images)
    [larger] = sampler.sample(PROMPTS[:2], 1, 5, sampler.options(size=(5, 8)))
    assert larger.images.shape == (2, 3, 20, 32)
    with pytest.raises(UserError, match="size: an image with given rows"):
        sampler.sample(PROMPTS, 1, 0, sampler.options(size=(5, 8)), prime=torch.zeros(4, dtype=torch.int64))


@pytest.fixture(scope="module")
def levels(folder, tmp_path_factory):
    """Exports of a VQ-VAE-2 and of the priors of its two levels, the second with captions."""
    root = tmp_path_factory.mktemp("levels")
    sizes = {"width": 8, "residual_width": 4, "blocks": 1, "dim": 8, "quantizer": {"vocab": 32}}
    tokenizer = export_stage(root / "vqvae2", "vqvae2", {}, image_size=32, downsampling=4, levels=2, **sizes)
    parts = {"tokenizer": tokenizer, "text_tokenizer": folder.parent / "text.model"}
    small = {"width": 16, "residual_width": 16, "layers": 1, "kernel": 3, "attention_blocks": 0, "heads": 2}
    more = {"grids": (4, 8), "vocab": 32, "output_layers": 0, "conditioning_layers": 1, **small}
    for level, captions in enumerate(({}, {"text_length": 8, "text_vocab": 48})):
        export_stage(root / f"prior_{level}", "vqvae2_prior", parts, level=level, **more, **captions)
    return root


def test_priors_draw_level_after_level(levels):
    priors = [levels / "prior_0", levels / "prior_1"]
    sampler = Sampler(priors[::-1])  # in any order
    [batch] = sampler.sample(PROMPTS[:2], 2, 7, sampler.options(temperature=0.9))
    top, bottom = (export.load(prior) for prior in priors)
    seeds = torch.tensor(batch.seed)
    text = sampler.text.encode([PROMPTS[index] for index in batch.prompt_index], 8)
    upper = top.stage.sample(top.nets, seeds, temperature=0.9)
    lower = bottom.stage.sample(bottom.nets, seeds, upper, text, temperature=0.9)
    expected = export.open_tokenizer(levels / "vqvae2").decode(torch.cat([upper, lower], dim=1))
    assert torch.equal(batch.images, expected)
    with pytest.raises(UserError, match="give the export of each level once"):
        Sampler(priors[1:])
    with pytest.raises(UserError, match="unknown key 'top_k'"):
        sampler.options(top_k=3)


def test_a_stage_that_draws_pixels(tmp_path):
    sizes = {"image_size": 16, "n_hid": 8, "multipliers": (1, 1), "latent": "vector", "latent_channels": 4}
    vae = export_stage(tmp_path / "vae", "vae", {}, **sizes)
    [batch] = Sampler([vae]).sample([""], 3, 1)
    opened = export.load(vae)
    assert torch.equal(batch.images, opened.stage.sample_images(opened.nets, torch.tensor(batch.seed)))
    with pytest.raises(UserError, match="several models sample together only if"):
        Sampler([vae, vae])
    with pytest.raises(UserError, match="samples pixels"):
        Sampler([vae]).prime_codes(tmp_path / "x.png", 1)
    with pytest.raises(UserError, match="options: unknown key 'method'"):
        Sampler([vae]).options(method="ddim", steps=10)


DDPM = {"image_size": 8, "width": 32, "multipliers": (1,), "blocks": 1, "attention_sizes": (), "timesteps": 24}


@pytest.fixture(scope="module")
def diffusion(folder, tmp_path_factory):
    """Export of an untrained diffusion model with captions."""
    more = {"text_length": 8, "text_vocab": 48, "caption_dropout": 0.1, "sampler": "ddim", "sampling_steps": 4}
    parts = {"text_tokenizer": folder.parent / "text.model"}
    return export_stage(tmp_path_factory.mktemp("diffusion") / "ddpm", "ddpm", parts, **DDPM, **more)


def test_diffusion_with_captions(diffusion):
    """The stage's images for the captions, sampled as its config says but for what is told."""
    sampler = Sampler([diffusion])
    batches = list(sampler.sample(PROMPTS[:2], 2, 7, sampler.options(guidance=3.0, steps=3), images_per_batch=3))
    seeds = torch.tensor([seed for batch in batches for seed in batch.seed])
    text = sampler.text.encode([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, 8)
    how = samplers.Options(method="ddim", steps=3, guidance=3.0)
    expected = sampler.stage.sample_images(sampler.models[0].nets, seeds, text=text, options=how)
    found = torch.cat([batch.images for batch in batches])
    # convolutions of another batch size may round another way, and a byte may tip
    assert (found.int() - expected.int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in found}) == 4
    [plain] = sampler.sample(PROMPTS[:1], 2, 7)
    [same] = sampler.sample(PROMPTS[:1], 2, 7, sampler.options(method="ddim", steps=4, spacing="uniform", eta=0.0))
    [other] = sampler.sample(PROMPTS[:1], 2, 7, sampler.options(method="ancestral"))
    assert torch.equal(plain.images, same.images) and not torch.equal(plain.images, other.images)
    assert not torch.equal(plain.images, found[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 25}, "steps: 25, but this model has 24 times; take 2 to 24"),
        ({"eta": 2.0}, "eta = 2.0: Input should be less than or equal to 1"),
        ({"method": "dpm++", "eta": 0.5}, "eta: is for method 'ddim'"),
        ({"method": "ancestral", "variance": "learned"}, "this model has learned none"),
        ({"top_k": 3, "temperature": 0.5}, "unknown key 'top_k'"),
        ({"spacing": "cubic"}, "spacing = 'cubic': Input should be 'uniform'"),
    ],
)
def test_diffusion_options_are_checked_before_the_first_batch(diffusion, options, message):
    with pytest.raises(UserError, match=message):
        sampler = Sampler([diffusion])
        sampler.sample(PROMPTS, 1, 0, sampler.options(**options))


def test_diffusion_without_captions(tmp_path):
    model = export_stage(tmp_path / "ddpm", "ddpm", {}, **DDPM)
    how = ["method=dpm++", "steps=4", "spacing=log_snr", "clip=true"]
    done = run_program("--model", model, "--out", tmp_path / "out", "--candidates", 2, *how)
    assert done.returncode == 0, done.stderr
    sampler = Sampler([model])
    [batch] = sampler.sample([""], 2, 0, sampler.options(method="dpm++", steps=4, spacing="log_snr", clip=True))
    for candidate, image in enumerate(batch.images):
        written = np.asarray(Image.open(tmp_path / "out" / "images" / f"00000_{candidate:04d}.png"))
        assert np.array_equal(written, image.permute(1, 2, 0).numpy())
    told = json.loads((tmp_path / "out" / "sampling.json").read_text())
    wanted = {"method": "dpm++", "steps": 4, "spacing": "log_snr", "eta": None, "clip": True}
    assert told["options"].items() >= wanted.items() and (told["seed"], told["candidates"]) == (0, 2)
    assert told["models_sha256"] == [digest(model)]
    assert set(MADE_BY) - told.keys() == {"weights", "step", "kept"}  # this export does not tell
    opened = export.load(model)
    states = {"model": opened.nets["model"].state_dict()}
    trained = {"step": 7, "steps": 9, "weights": {"model": "ema 0.9"}}
    export.save(tmp_path / "trained", "ddpm", opened.config, states, trained=trained)
    trained_sampler = Sampler([tmp_path / "trained"])
    told = trained_sampler.record(trained_sampler.options())
    assert (told["weights"], told["step"]) == (["ema 0.9"], [7])
    default = sampler.record(sampler.options())["options"]
    assert (default["steps"], default["spacing"], default["variance"]) == (DDPM["timesteps"], "uniform", "fixed_large")
    with pytest.raises(UserError, match=r"guidance: 2.0, but this model was trained without caption_dropout"):
        sampler.sample([""], 1, 0, sampler.options(guidance=2.0))
    with pytest.raises(UserError, match="trained without captions; leave them out"):
        Sampler([model]).sample(["a red circle"], 1, 0)


def test_long_prompts_are_cut_and_counted(folder):
    sampler = Sampler([folder])
    list(sampler.sample([*PROMPTS, "a red circle " * 20], candidates=2, seed=0))
    assert sampler.text.truncated_samples >= 1


def test_exports_that_cannot_draw(folder, tmp_path):
    with pytest.raises(UserError, match="stage 'dvae' does not sample images"):
        Sampler([folder.parent / "dvae"])
    sizes = {"text_vocab": 48, "text_length": 8, "image_vocab": 12, "grid": 4, "width": 16, "layers": 1, "heads": 2}
    bare = export_stage(tmp_path / "bare", "dalle", {}, **sizes)
    with pytest.raises(UserError, match="no image tokenizer"):
        Sampler([bare])
    half = export_stage(tmp_path / "half", "dalle", {"tokenizer": folder.parent / "dvae"}, **sizes)
    with pytest.raises(UserError, match="no text tokenizer"):
        Sampler([half])
    assert Sampler([half], text_tokenizer=folder.parent / "text.model").text.vocab == 48


@pytest.mark.parametrize(
    "options",
    [{"candidates": 0}, {"images_per_batch": 0}, {"top_p": 2.0}, {"temperature": -1.0}],
)
def test_wrong_parameters_are_said_before_the_first_batch(folder, options):
    with pytest.raises(UserError):
        sampler, numbers = Sampler([folder]), {"candidates": 1, "seed": 0}
        chosen = sampler.options(**{name: options[name] for name in options if name.startswith("t")})
        sampler.sample(PROMPTS, options=chosen, **numbers | {k: v for k, v in options.items() if not k.startswith("t")})


def run_program(*arguments, **environment):
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_program(folder, tmp_path):
    """Prompts from both sources; files, rows and grid; deepspeed and webdataset cannot be imported."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two circles", "group": "x"}\n')
    for name in ("deepspeed", "webdataset"):
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError")
    arguments = ["--model", folder, "--out", tmp_path / "out", "--candidates", 2, "--seed", 5, "--batch-size", 3]
    arguments += ["--prompts", PROMPTS[0], "--prompt-file", tmp_path / "prompts.jsonl"]
    done = run_program(*arguments, PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt_index"], row["prompt"], row["candidate"]) for row in rows] == [
        (0, "a red circle", 0),
        (0, "a red circle", 1),
        (1, "two circles", 0),
        (1, "two circles", 1),
    ]
    sampled = collect(Sampler([folder]).sample(["a red circle", "two circles"], candidates=2, seed=5))
    for row in rows:
        seed, image = sampled[row["prompt_index"], row["candidate"]]
        pixels = np.asarray(Image.open(tmp_path / "out" / row["file"]))
        assert row["seed"] == seed and np.array_equal(pixels, image.permute(1, 2, 0).numpy())
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 * 18 - 2, 2 * 18 - 2)


def test_wrong_value_is_one_line_and_keeps_what_was_there(folder, tmp_path):
    (tmp_path / "samples.jsonl").write_text("earlier\n")
    done = run_program("--model", folder, "--out", tmp_path, "--prompts", "a", "top_p=0")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: options: top_p = 0: Input should be greater than 0"
    assert (tmp_path / "samples.jsonl").read_text() == "earlier\n"


def test_options_are_listed_and_a_typo_gets_the_nearest_name(folder, tmp_path):
    done = run_program("--list-options", folder)
    assert done.returncode == 0, done.stderr
    assert "top_p: float, > 0, <= 1, default 1.0, keep the likeliest codes that hold this share" in done.stdout
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} >= {"temperature", "top_k", "guidance", "size"}
    done = run_program("--model", folder, "--out", tmp_path / "out", "--prompts", "a", "temprature=0.5")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: options: unknown key 'temprature'; did you mean 'temperature'?"
