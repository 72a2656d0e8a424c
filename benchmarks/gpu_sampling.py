"""Candidates of one caption sampled by the 12-billion-parameter model with random weights: wall time and memory.

The matrices are of 16 bits, as in training, and the rest fp32. Batches are as large as the program makes them. Drawn
codes are decoded by the paper's dVAE with random weights, image by image, as the program does; the program decodes
beside the next batch, here it comes after. One candidate is sampled before, and its seconds are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gpu_clock
import torch
from environment import ROOT
from torch import Tensor, nn

from dalle_scale import config as configs
from dalle_scale import log
from dalle_scale.cluster.activation_memory import open_stage
from dalle_scale.models.transformer import cache_size
from dalle_scale.nn.residual_scaling import cast
from dalle_scale.sampling import batch_size


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    config: str  # of the transformer, below configs/, without .yaml
    decoder: str  # of the dVAE
    candidates: int
    samples: int  # sampled at a time; 0 = as many as the program would


FULL = Sizes("dalle/paper_12b", "dvae/paper_256", candidates=512, samples=0)
TOY = Sizes("tiny/dalle", "tiny/dvae", candidates=7, samples=0)


@torch.inference_mode()
def measure(sizes: Sizes, device: torch.device, report: gpu_clock.Report) -> None:
    """Sample, decode, write."""
    rate = gpu_clock.matrix_rate(device)
    stage, nets = opened(sizes.config, device)
    model = nets["model"]
    cast(model, "bf16")
    gpu_clock.release(device)
    generator = torch.Generator().manual_seed(0)
    caption = torch.randint(stage.config.text_vocab, (1, stage.config.text_length), generator=generator).to(device)
    fitting = sizes.samples or batch_size.images_per_batch(
        cache_size.sampling_memory(model, guided=False), 1, sizes.candidates, device
    )
    batch = batch_size.even(sizes.candidates, fitting)

    def sample_codes(seeds: Tensor) -> Tensor:
        codes: Tensor = stage.sample(nets, caption.expand(len(seeds), -1), seeds)
        return codes

    one = gpu_clock.seconds(lambda: sample_codes(torch.arange(1, device=device)), device)
    gpu_clock.forget_peak(device)
    before = gpu_clock.peak_bytes(device)
    found: list[Tensor] = []

    def sample_all() -> None:
        parts = torch.split(torch.arange(sizes.candidates, device=device), batch)
        found.extend(sample_codes(seeds) for seeds in log.progress(parts, "sample", "batches", len(parts)))

    sampling, peak = gpu_clock.seconds(sample_all, device), gpu_clock.peak_bytes(device)
    decoding = gpu_clock.seconds(lambda: decode(torch.cat(found), sizes.decoder, device), device)
    report.write(
        {
            "config": sizes.config,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "candidates": sizes.candidates,
            "drawn_at_a_time": batch,
            "matrix_rate": rate,
            "seconds": round(sampling + decoding, 3),
            "seconds_drawing": round(sampling, 3),
            "seconds_decoding": round(decoding, 3),
            "seconds_of_one_candidate_alone": round(one, 3),
            "seconds_a_candidate": round((sampling + decoding) / sizes.candidates, 4),
            "different_candidates": len(torch.unique(torch.cat(found), dim=0)),
            "memory_a_candidate": {
                "measured_bytes": None if peak is None or before is None else round((peak - before) / batch),
                "cache_bytes": cache_size.cache_bytes(model),
            },
            "caption_bytes": cache_size.caption_bytes(model),
            "peak_bytes": peak,
        }
    )


def opened(name: str, device: torch.device) -> tuple[Any, dict[str, nn.Module]]:
    """The stage of a config and its nets with random weights, which take no gradient, sampled where they will be."""
    stage = open_stage(configs.load(ROOT / "configs" / f"{name}.yaml"))
    torch.manual_seed(0)
    with torch.inference_mode(False), device:
        nets = stage.nets()
    for net in nets.values():
        net.eval().requires_grad_(False)
    return stage, nets


def decode(codes: Tensor, name: str, device: torch.device) -> list[Tensor]:
    """Images uint8 [1, 3, S, S] of codes [N, P], on the CPU."""
    stage, nets = opened(name, device)
    tokenizer = stage.tokenizer(nets)
    return [tokenizer.decode(one).cpu() for one in log.progress(torch.split(codes, 1), "decode", "images", len(codes))]
