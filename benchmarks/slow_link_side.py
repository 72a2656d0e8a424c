"""One node of slow_link.py: one rank, in a network namespace of its own. Limits its end of the link, and trains.

A transformer on random codes: fp32, ZeRO 1 inside the node, which is this one rank. Two engines of the same net take
steps in turn: `exact` averages its gradients between the nodes as they are, `compressed` with PowerSGD.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dalle_scale import config as configs
from dalle_scale import dist, log, stages
from dalle_scale.config import RunConfig
from dalle_scale.engine import build, optim, powersgd
from dalle_scale.types import Batch, Nets, Stage, UserError

SHARE = 0.15  # of the bytes of the matrices that compression leaves, as in the paper (App. E.2)
MODEL = {"text_length": 0, "image_vocab": 1024, "grid": 8, "width": 384, "layers": 6, "heads": 6, "conv_kernel": 5}
BATCH_SIZE = 4
TREE = {
    "stage": "dalle",
    "run": "none",
    "steps": 1_000_000,
    "global_batch_size": BATCH_SIZE,
    "model": MODEL,
    "data": {"train": "none"},
    "optim": {"model": {"lr": 1e-4, "betas": [0.9, 0.96], "eps": 1e-6, "weight_decay": 0.045, "clip_norm": 4.0}},
    "engine": {"zero": 1, "nodes": 2, "dtype": "fp32"},
}
TOLERANCE = 0.1  # of the rate that the link should have; headers take 5 %
PROBE_SECONDS, PROBE_BYTES = 1.0, 256 * 2**20  # of the bare connection: at a rate, without one
ROUNDS = 3  # of it; the best counts, because other work can only make it slower


@dataclass
class Link:
    """This end of the link, and a bare connection over it."""

    card: str
    connection: socket.socket

    @classmethod
    def open(cls, card: str) -> Link:
        """Both ends call it."""
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1)
        if dist.is_main():
            with socket.create_server(place) as server:
                dist.barrier()
                return cls(card, server.accept()[0])
        dist.barrier()
        return cls(card, socket.create_connection(place))

    def limit(self, rate_mbps: int) -> None:
        """What this end sends from now on, Mbit/s; 0 = without a limit. Also the bytes of headers count."""
        subprocess.run(["tc", "qdisc", "del", "dev", self.card, "root"], capture_output=True)  # if there was one
        if rate_mbps:
            line = f"tc qdisc add dev {self.card} root tbf rate {rate_mbps}mbit burst 256kb latency 50ms"
            subprocess.run(line.split(), check=True)
        dist.barrier()

    def measure_mbps(self, rate_mbps: int) -> list[float]:
        """What a bare connection carries from rank 0 to rank 1 and back.

        Raises:
            UserError: not the rate that the link should have.
        """
        count = int(PROBE_SECONDS * rate_mbps * 1e6 / 8) or PROBE_BYTES
        nets_to_update = [self._send if dist.rank() == sender else self._receive for sender in range(2)]
        found = [max(net_name(count) for _ in range(ROUNDS)) for net_name in nets_to_update]
        for mbps in found:
            if rate_mbps and not (1 - TOLERANCE) * rate_mbps <= mbps <= (1 + TOLERANCE) * rate_mbps:
                raise UserError(f"the link carries {mbps:.0f} Mbit/s, {rate_mbps} were set; is the node too busy?")
        return [round(mbps, 1) for mbps in found]

    def _send(self, count: int) -> float:
        began = time.perf_counter()
        self.connection.sendall(bytes(count))
        self.connection.recv(1)
        mbps = 8e-6 * count / (time.perf_counter() - began)
        return dist.broadcast(torch.tensor([mbps]), source=dist.rank()).item()

    def _receive(self, count: int) -> float:
        part = bytearray(2**20)
        while count:
            count -= self.connection.recv_into(part, min(count, len(part)))
        self.connection.sendall(b"!")
        return dist.broadcast(torch.zeros(1), source=1 - dist.rank()).item()

    def sent_bytes(self) -> int:
        """By this end, headers included, since it exists."""
        return int(Path("/sys/class/net", self.card, "statistics/tx_bytes").read_text())


@dataclass
class Side:
    """One of the two engines, and what its steps took, on the slower node each."""

    stage: Stage
    trained_nets: build.TrainedNets
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)

    def step(self, batch: Batch, link: Link) -> None:
        """One timed step, as `train.Trainer` has it."""
        dist.barrier()
        sent, began, used = link.sent_bytes(), time.perf_counter(), time.process_time()
        trained_net = self.trained_nets["model"]
        with self.trained_nets.updating("model") as nets:
            trained_net.backward(self.stage.loss("model", nets, batch, self.steps).total)
        trained_net.step(self.steps)
        took = torch.tensor([time.perf_counter() - began, time.process_time() - used], dtype=torch.float64)
        self.wire_bytes.append(link.sent_bytes() - sent)
        seconds, processor_seconds = dist.all_reduce(took, "max").tolist()
        self.seconds.append(seconds)
        self.processor_seconds.append(processor_seconds)
        self.steps += 1

    def mib_averaged(self) -> float:
        """What this rank gives to collectives between nodes in a step; a ring of two sends as much."""
        return self.trained_nets.numbers()["between_nodes_mib"] / self.steps

    def take(self) -> dict[str, Any]:
        """The steps since the last call, but for the first, which also fills the link's queues."""
        rows = {name: getattr(self, name)[1:] for name in ("seconds", "processor_seconds", "wire_bytes")}
        self.seconds, self.processor_seconds, self.wire_bytes = [], [], []
        return rows


def main() -> None:
    """Measure what the folder of the command line plans; rank 0 writes it there."""
    folder = Path(sys.argv[-1])
    plan = json.loads((folder / "plan.json").read_text())
    build.start()
    config = configs.parse(RunConfig, TREE, where="slow_link_side.py")
    stage = open_stage(config)
    rank, left = paper_rank(stage.nets(), config)
    sides = {"exact": open_side(config, stage, 0), "compressed": open_side(config, stage, rank)}
    generator = torch.Generator().manual_seed(dist.rank())
    shape = (BATCH_SIZE // 2, MODEL["grid"] ** 2)
    batch = {"codes": torch.randint(MODEL["image_vocab"], shape, generator=generator), "weight": torch.ones(shape[0])}
    link, links = Link.open(plan["card"]), []
    for rate in plan["rates_mbps"]:
        link.limit(rate)
        measured = link.measure_mbps(rate)
        for _ in log.progress(range(plan["repetitions"] + 1), f"{rate} Mbit/s", "repetitions", plan["repetitions"] + 1):
            for side in sides.values():
                side.step(batch, link)
        links.append({"measured_mbps": measured} | {name: side.take() for name, side in sides.items()})
    result = {
        "model": MODEL,
        "parameters": sum(p.numel() for p in sides["exact"].trained_nets["model"].module.parameters()),
        "global_batch_size": BATCH_SIZE,
        "compression_rank": rank,
        "share_of_matrices_left": round(left, 4),
        "mib_averaged": {name: round(side.mib_averaged(), 2) for name, side in sides.items()},
        "links": links,
    }
    if dist.is_main():
        (folder / "result.json").write_text(json.dumps(result))


def open_stage(config: RunConfig) -> Stage:
    """The transformer's."""
    stage_class = stages.resolve(config.stage)
    return stage_class(configs.parse(stage_class.Config, config.model, where="model"))


def open_side(config: RunConfig, stage: Stage, rank: int) -> Side:
    """An engine with this rank of compression; both begin with the same weights. Collective."""
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"compression_rank": rank})})
    dist.seed_everything(config.seed, step=-1)
    nets = stage.nets()
    build.share(nets)
    return Side(stage, build.build(config, nets))


def paper_rank(nets: Nets, config: RunConfig) -> tuple[int, float]:
    """The largest rank whose factors take at most `SHARE` of what they stand for, and the share that they take."""
    groups = optim.param_groups(nets["model"], config.optim["model"])
    shapes = [(len(p), p[0].numel()) for group in groups if group["role"] == "matrix" for p in group["params"]]
    whole, sides = sum(m * n for m, n in shapes), sum(m + n for m, n in shapes)
    rank = int(SHARE * whole / sides)
    assert all(powersgd.pays(m, n, rank) for m, n in shapes)
    return rank, rank * sides / whole


if __name__ == "__main__":
    log.guarded(main)
