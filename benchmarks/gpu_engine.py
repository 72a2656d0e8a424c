"""A transformer of configs/dalle in the program's own engine on one device, fed with synthetic tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from environment import ROOT
from torch import Tensor

from dalle_scale import config as configs
from dalle_scale import dist
from dalle_scale.cluster import plan
from dalle_scale.cluster.activation_memory import open_stage
from dalle_scale.config import RunConfig
from dalle_scale.engine import build, memory
from dalle_scale.types import Batch, Stage

TOY = "tiny/dalle"
# No average of weights: it takes 4 bytes a parameter, and no training here is long enough to need one
ALONE = ("engine.zero=1", "optim.model.ema_decay=0", "model.caption_dropout=0", "data.train=none")


def load(name: str, samples: int, accumulation: int, *overrides: str) -> RunConfig:
    """The config configs/<name>.yaml for one rank, with `samples` in a micro-batch. Raises UserError."""
    batch = (f"global_batch_size={samples * accumulation}", f"engine.micro_batch_size={samples}")
    return configs.load(ROOT / "configs" / f"{name}.yaml", [*ALONE, *batch, *overrides])


@dataclass
class Run:
    """A model in training."""

    config: RunConfig
    stage: Stage
    trained_nets: build.TrainedNets
    steps: int = 0

    @classmethod
    def open(cls, config: RunConfig) -> Run:
        """Fresh weights, sampled where they will be: a CPU would take minutes for billions."""
        build.start()
        dist.seed_everything(config.seed, step=-1)
        stage = open_stage(config)
        with dist.device():
            nets = stage.nets()
        return cls(config, stage, build.build(config, nets))

    def update(self, batches: list[Batch], before_step: Callable[[], Any] = lambda: None) -> Tensor:
        """One step as `train.Trainer` has it; the mean loss in nats, on the device.

        before_step: called when all gradients are there.
        """
        dist.seed_everything(self.config.seed, self.steps)
        trained_net, losses = self.trained_nets["model"], []
        with self.trained_nets.updating("model") as nets:
            for batch in batches:
                total = self.stage.loss("model", nets, batch, self.steps).total
                trained_net.backward(total)
                losses.append(total.detach())
        before_step()
        trained_net.step(self.steps)
        self.steps += 1
        return torch.stack(losses).mean()

    def close(self) -> None:
        """Let go of the engine, which DeepSpeed would keep; then `gpu_clock.release` frees its memory."""
        self.trained_nets["model"].engine.destroy()
        self.trained_nets.clear()


def random_batches(run: Run, device: torch.device) -> list[Batch]:
    """The micro-batches of a step: captions without pads and codes, uniformly sampled, the same every time."""
    generator = torch.Generator().manual_seed(0)
    samples = run.config.micro_batch_size(1)
    model = run.config.model

    def batch() -> Batch:
        text = torch.randint(model["text_vocab"], (samples, model["text_length"]), generator=generator)
        codes = torch.randint(model["image_vocab"], (samples, model["grid"] ** 2), generator=generator)
        return to_batch(text, codes, device)

    return [batch() for _ in range(run.config.accumulation(1))]


def to_batch(text: Tensor, codes: Tensor, device: torch.device) -> Batch:
    """A micro-batch of full weight."""
    seeds = torch.arange(len(text))
    batch = {"text": text, "codes": codes, "id": seeds, "seed": seeds, "weight": torch.ones(len(text))}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def tokens(config: RunConfig) -> int:
    """Of a step: captions and codes, pads included."""
    model = config.model
    count: int = config.global_batch_size * (model["text_length"] + model["grid"] ** 2)
    return count


def planned(config: RunConfig, memory_gib: float, flops: float) -> dict[str, Any]:
    """What launch/plan.py predicts of this run on one GPU: the row of its ZeRO stage, and the parameters. `lasting` are
    the bytes that are there whenever all gradients are."""
    alone = {"nodes": 1, "gpus": 1, "memory_gib": memory_gib, "flops": flops, "intra_gbps": 1.0, "inter_gbps": 1.0}
    document = plan.document(config, configs.parse(plan.Cluster, alone, where="cluster"))
    row = document["zero"][config.engine.zero]
    with torch.device("meta"):
        net = open_stage(config).nets()["model"]
    return {
        "parameters": document["parameters"]["model"]["total"],
        "lasting_bytes": sum(memory.estimate(net, config, "model", 1).values()),
        "peak_bytes": row["memory_bytes"]["peak"],
        "memory_bytes": row["memory_bytes"],
    }


def shares(config: RunConfig, stage: Stage, seconds: float, rate: float) -> dict[str, float]:
    """Tokens a second, and the share of the matrix rate: of the operations that the masks need, and with those of
    recomputed activations."""
    flops = stage.flops_per_sample() * config.global_batch_size
    done = flops * (plan.RECOMPUTED if config.engine.activation_checkpointing else 1)
    return {
        "tokens_per_second": round(tokens(config) / seconds, 1),
        "flops_that_the_masks_need": flops,
        "share_of_matrix_rate": round(flops / seconds / rate, 5),
        "share_of_matrix_rate_with_recomputation": round(done / seconds / rate, 5),
    }
