"""Steps of training on two nodes that a slow link joins, with exact means of gradients and with compressed ones.

    sudo python benchmarks/slow_link.py

The nodes are network namespaces on this one, joined by a pair of virtual cards whose rate `tc` (tbf) limits in both
directions; each starts deepspeed's launcher as docs/cluster.md has it without ssh. Exact and compressed steps take
turns at every rate, in the same two processes (slow_link_side.py), one thread each. First the link itself is timed with
a bare connection: a rate that it does not have ends the program. Needs root, `ip` and `tc`. Writes
benchmarks/results/slow_link.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environment import describe

from dalle_scale import log
from dalle_scale.types import UserError

HERE = Path(__file__).parent
RESULT = HERE / "results" / "slow_link.json"
ADDRESSES, CARD = ("10.77.0.1", "10.77.0.2"), "slow0"
SIDES = ("exact", "compressed")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each kind at each rate")
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 1000, 100], help="of the link, Mbit/s; 0 = any")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces do not go by themselves
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None] + ["root"] * (os.geteuid() != 0)
    if missing:
        raise UserError(f"needs root, and ip and tc of the package iproute2; missing here: {', '.join(missing)}")
    measured = measure({"repetitions": args.repetitions, "rates_mbps": args.rates, "card": CARD})
    links = {_name(rate): summary(link) for rate, link in zip(args.rates, measured.pop("links"), strict=True)}
    result = {**measured, "repetitions": args.repetitions, "links": links, **describe()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    log.say(table(links))


def measure(plan: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of the two nodes has written. plan: for slow_link_side.py."""
    with tempfile.TemporaryDirectory() as name, two_nodes() as nodes:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        processes = []
        try:
            for rank, machine in enumerate(nodes):
                processes.append(subprocess.Popen(command(folder, rank, machine), env=environment()))
            while None in [process.poll() for process in processes] and not any(p.returncode for p in processes):
                time.sleep(0.2)
        finally:
            for process in processes:
                process.terminate()  # the launcher passes it on
                process.wait()
        if any(process.returncode for process in processes):
            raise UserError(f"the nodes ended with exit codes {[process.returncode for process in processes]}")
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found


def command(folder: Path, rank: int, machine: str) -> list[str]:
    """The launcher of one node."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--hostfile", str(folder / "hosts"), "--no_ssh"]
    place = ["--node_rank", str(rank), "--master_addr", ADDRESSES[0], "--master_port", "29500"]
    return ["ip", "netns", "exec", machine, *launcher, *place, str(HERE / "slow_link_side.py"), str(folder)]


def environment() -> dict[str, str]:
    """Of the launchers."""
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CARD}


@contextmanager
def two_nodes() -> Iterator[list[str]]:
    """Names of two network namespaces with a card each, joined by a link of any rate. They go with their names."""
    names = [f"dalle-scale-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CARD, "netns", names[0], "type", "veth", "peer", "name", CARD, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                ip("-n", name, "link", "set", card, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)  # the second may not be there


def ip(*arguments: str) -> None:
    """Run `ip`.

    Raises:
        UserError: it does not work here, as in a container without the right to change networks.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def summary(link: dict[str, Any]) -> dict[str, Any]:
    """Medians and spread of one rate."""
    rows = {}
    for side in SIDES:
        seconds = link[side]["seconds"]
        rows[side] = {
            "seconds": round(statistics.median(seconds), 3),
            "seconds_lowest": round(min(seconds), 3),
            "seconds_highest": round(max(seconds), 3),
            "processor_seconds": round(statistics.median(link[side]["processor_seconds"]), 3),
            "mib_on_the_wire": round(statistics.median(link[side]["wire_bytes"]) / 2**20, 2),
        }
    ratios = [a / b for a, b in zip(*(link[side]["seconds"] for side in SIDES), strict=True)]
    fast = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    times = {key: round(value, 2) for key, value in fast.items()}
    return {"measured_mbps": link["measured_mbps"], **rows, "compressed_is_times_as_fast": times}


def table(links: dict[str, Any]) -> str:
    """What there is to see."""
    lines = [f"{'link':>12} {'measured':>9} {'exact':>22} {'compressed':>22} {'times as fast':>22}"]
    for name, link in links.items():
        cells = [f"{link[side]['seconds']:.2f} s" for side in SIDES]
        spreads = [f"({link[side]['seconds_lowest']:.2f} to {link[side]['seconds_highest']:.2f})" for side in SIDES]
        times = link["compressed_is_times_as_fast"]
        cells.append(f"{times['median']:.2f}")
        spreads.append(f"({times['lowest']:.2f} to {times['highest']:.2f})")
        row = " ".join(f"{cell} {spread}".rjust(22) for cell, spread in zip(cells, spreads, strict=True))
        lines.append(f"{name:>12} {min(link['measured_mbps']):>9.0f} {row}")
    return "\n".join(lines)


def _name(rate_mbps: int) -> str:
    return f"{rate_mbps} Mbit/s" if rate_mbps else "not limited"


if __name__ == "__main__":
    log.guarded(main)
