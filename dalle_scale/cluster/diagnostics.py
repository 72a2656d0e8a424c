"""Faults of a cluster, found before anything is allocated: every rank reports, and the odd one is named.

A roll call over a key-value store comes first, because a process group waits for a missing rank without saying which.
Then what the ranks say of themselves is compared, a sum is taken, and each link of a ring of ranks and each rank's
arithmetic is timed. Slow is what stays below a share (`slow_below`) of the median of its kind.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist

from dalle_scale import dist
from dalle_scale.cluster import probes
from dalle_scale.cluster.probes import Facts
from dalle_scale.types import UserError

CLOCK_SECONDS = 1.0  # difference at which logs of several machines no longer tell what came first
Link = tuple[int, int]  # two ranks


@dataclass(frozen=True)
class Report:
    """Findings. Lists are by rank."""

    facts: list[Facts]
    clocks: list[float]  # seconds ahead of rank 0's
    gflops: list[float]  # 1e9 operations a second
    links: dict[Link, tuple[float, float]]  # bandwidth in 1e9 bytes a second, latency in seconds
    defects: list[str]  # one line each


def examine(run: Path, timeout_seconds: float, slow_below: float) -> Report | None:
    """Everything, in order. A collective of all processes that the launcher's environment describes.

    Args:
        run: folder that all ranks must share; made if absent.
        timeout_seconds: limit for the roll call, and for each probe after it.
        slow_below: share of the median below which speed is a defect, 0..1.

    Returns:
        The report on rank 0, None on the others.

    Raises:
        UserError: ranks did not arrive, or a probe broke. If one does not end, the process does, with exit code 2.
    """
    torch.set_num_threads(1)
    if dist.device().type == "cuda":
        torch.cuda.set_device(dist.device())
    store = _open_store(timeout_seconds)
    hosts = roll_call(store, timeout_seconds)
    probe = _Probes(store, timeout_seconds, hosts)
    facts = [Facts(**fact) for fact in probe.collect("facts", asdict(probes.facts_of_this_rank()))]
    with probe("joining the process group"):
        _join(store, timeout_seconds)
    with probe("an all-reduce"):
        sums = probe.collect("sum", probes.first_sum())
    with probe("writing to the shared folder"):
        shared = probe.collect("shared", probes.share(run))
    with probe("comparing clocks"):
        clocks = probe.collect("clock", probes.measure_clock())
    with probe("multiplying matrices"):
        gflops = probe.collect("gflops", probes.measure_gflops())
    with probe("sending to neighbours"):
        links = probe.collect("links", probes.measure_link())
    if not dist.is_main():
        return None
    measured = {(rank, (rank + 1) % len(hosts)): tuple(link) for rank, link in enumerate(links) if link}
    right = len(hosts) * (len(hosts) + 1) / 2
    defects = compare([{"device": fact.device} | fact.environment for fact in facts], hosts)
    defects += [f"{_who([r], hosts)}: a sum over ranks gave {s}, not {right}" for r, s in enumerate(sums) if s != right]
    defects += [f"{_who([rank], hosts)}: {text}" for rank, text in enumerate(shared) if text]
    defects += [
        f"{_who([rank], hosts)}: its clock is {ahead:+.1f} s off rank 0's: use one time server"
        for rank, ahead in enumerate(clocks)
        if abs(ahead) > CLOCK_SECONDS
    ]
    free = [fact.free_bytes / 2**30 for fact in facts]
    defects += judge(free, hosts, slow_below, "free memory", "GiB")
    defects += judge(gflops, hosts, slow_below, "slow arithmetic", "GFLOP/s")
    defects += judge_links({link: speed for link, (speed, _) in measured.items()}, hosts, slow_below)
    return Report(facts, clocks, gflops, measured, defects)


def table(report: Report) -> str:
    """One line a rank. Its link is that to the next rank, in a ring."""
    following = {a: link for (a, _), link in report.links.items()}
    lines = [f"{'rank':>4}  {'host':16}  {'device':25}  free/total GiB   GFLOP/s  link GB/s  latency ms  clock ms"]
    for fact, gflops, clock in zip(report.facts, report.gflops, report.clocks, strict=True):
        memory = f"{fact.free_bytes / 2**30:.1f}/{fact.total_bytes / 2**30:.1f}"
        speed, latency = following.get(fact.rank, (math.nan, math.nan))
        line = f"{fact.rank:4}  {fact.host[:16]:16}  {fact.device[:25]:25}  {memory:>14}  {gflops:8.1f}"
        lines.append(f"{line}  {speed:9.3f}  {1e3 * latency:10.3f}  {1e3 * clock:8.1f}")
    return "\n".join(lines)


def roll_call(store: torch_dist.TCPStore, timeout_seconds: float) -> list[str]:
    """Hosts by rank, once all ranks have written theirs into `store`, which is rank 0's.

    Raises:
        UserError: on every rank that is there, naming those that are not.
    """
    world_size = dist.world_size()
    store.set(f"host/{dist.rank()}", socket.gethostname())
    keys = [f"host/{rank}" for rank in range(world_size)]
    if dist.is_main():
        until = time.monotonic() + timeout_seconds
        while not (complete := store.check(keys)) and time.monotonic() < until:
            time.sleep(0.1)
        missing = [] if complete else [rank for rank, key in enumerate(keys) if not store.check([key])]
        store.set("missing", json.dumps(missing))
    missing = json.loads(store.get("missing"))
    if missing:
        there = [rank for rank in range(world_size) if rank not in missing]
        hosts = [store.get(keys[rank]).decode() if rank in there else "" for rank in range(world_size)]
        store.add("heard", 1)
        until = time.monotonic() + 2
        while dist.is_main() and store.add("heard", 0) < len(there) and time.monotonic() < until:
            time.sleep(0.05)  # the store ends with this process
        raise UserError(
            f"{_ranks(missing)} of {world_size} did not arrive within {timeout_seconds:g} s; there are "
            f"{_who(there, hosts)}: look at the output of the missing, and whether their machines reach "
            f"{store.host}:{store.port}"
        )
    return [host.decode() for host in store.multi_get(keys)]


def compare(facts: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """A line for each value that is not what most ranks have, or, among equals, what rank 0 has."""
    lines = []
    for name in sorted({name for one in facts for name in one}):
        values = [one.get(name, "unset") for one in facts]
        counts = Counter(values)  # in the order of the ranks, which max keeps
        usual = max(counts, key=lambda value: counts[value])
        for value in (value for value in counts if value != usual):
            ranks = [rank for rank, other in enumerate(values) if other == value]
            lines.append(f"{_who(ranks, hosts)}: {name} is '{value}', elsewhere '{usual}'")
    return lines


def judge(numbers: list[float], hosts: list[str], slow_below: float, what: str, unit: str) -> list[str]:
    """A line for each rank whose number is below a share of the median over the ranks."""
    median = statistics.median(numbers)
    return [
        f"{_who([rank], hosts)}: {what}: {number:.3g} {unit}, below {slow_below:g} x the median of {median:.3g}"
        for rank, number in enumerate(numbers)
        if number < slow_below * median
    ]


def judge_links(speeds: dict[Link, float], hosts: list[str], slow_below: float) -> list[str]:
    """Links inside machines and between machines are compared among themselves: each rank, or machine, by the best link
    it has, because a slow one makes two links slow. A link between two good ones can be slow too. Of fewer than three
    nobody can say which is slow."""
    lines = []
    for inside in (True, False):
        chosen = {link: speed for link, speed in speeds.items() if (hosts[link[0]] == hosts[link[1]]) == inside}
        best: dict[str, float] = {}
        for link, speed in chosen.items():
            for name in _ends(link, hosts, inside):
                best[name] = max(speed, best.get(name, 0.0))
        if len(best) < 3:
            continue
        median = statistics.median(best.values())
        limit, rule = slow_below * median, f"below {slow_below:g} x the median of {median:.3g}"
        slow = {name for name, speed in best.items() if speed < limit}
        lines += [f"{name}: slow links: {best[name]:.3g} GB/s at best, {rule}" for name in best if name in slow]
        for link, speed in chosen.items():
            ends = _ends(link, hosts, inside)
            if speed < limit and not slow & set(ends):
                lines.append(f"between {' and '.join(ends)}: a slow link: {speed:.3g} GB/s, {rule}")
    return lines


def _ends(link: Link, hosts: list[str], inside: bool) -> list[str]:
    return [_who([rank], hosts) if inside else f"host {hosts[rank]}" for rank in link]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _who(ranks: list[int], hosts: list[str]) -> str:
    """Ranks and their hosts, in words."""
    names = sorted({hosts[rank] for rank in ranks})
    return f"{_ranks(ranks)} on {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


class _Probes:
    """Runs what may hang. Names those who did not begin it."""

    def __init__(self, store: torch_dist.TCPStore, timeout_seconds: float, hosts: list[str]) -> None:
        self._store, self._timeout_seconds, self._hosts = store, timeout_seconds, hosts

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Run the block in time.

        Raises:
            UserError: torch's communication raised.
        """
        self._store.set(f"{what}/{dist.rank()}", "")
        timer = threading.Timer(self._timeout_seconds, self._expire, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{what} failed: {self._absent(what)[1]} ({reason})") from error
        finally:
            timer.cancel()

    def collect(self, what: str, value: Any) -> list[Any]:
        """Values of all ranks, on rank 0; elsewhere nothing."""
        self._store.set(f"{what} of {dist.rank()}", json.dumps(value))
        keys = [f"{what} of {rank}" for rank in range(dist.world_size())]
        return [json.loads(text) for text in self._store.multi_get(keys)] if dist.is_main() else []

    def _expire(self, what: str) -> None:
        present, text = self._absent(what)
        if dist.rank() == min(present):
            print(f"error: {what} did not end in {self._timeout_seconds:g} s: {text}", file=sys.stderr, flush=True)
        time.sleep(1)  # the launcher ends all ranks with the first, and the store ends with rank 0
        os._exit(3)

    def _absent(self, what: str) -> tuple[list[int], str]:
        """Ranks that began, and a text about those that did not."""
        store, ranks = self._store.clone(), range(dist.world_size())  # the main thread may wait with the other
        present = [rank for rank in ranks if store.check([f"{what}/{rank}"])]
        late = [rank for rank in ranks if rank not in present]
        text = f"{_who(late, self._hosts)} did not begin it" if late else "all ranks began it; look at the network"
        return present, text


def _open_store(timeout_seconds: float) -> torch_dist.TCPStore:
    """The key-value store of the job, served by rank 0."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    # Others wait for rank 0's verdict, which takes a timeout if a rank is missing
    limit = timedelta(seconds=timeout_seconds * (1 if dist.is_main() else 2) + 5)
    try:
        return torch_dist.TCPStore(address, port, None, dist.is_main(), timeout=limit, wait_for_workers=False)
    except torch_dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rank 0 does not answer at {address}:{port}: absent or out of reach ({reason})") from error


def _join(store: torch_dist.TCPStore, timeout_seconds: float) -> None:
    torch_dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if dist.device().type == "cuda" else "gloo",
        store=torch_dist.PrefixStore("group", store),
        rank=dist.rank(),
        world_size=dist.world_size(),
        timeout=timedelta(seconds=2 * timeout_seconds),  # `_Probes` is first
    )
