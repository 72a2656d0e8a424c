"""Faults thrown at loaders: what each delivers, loses with a message, loses in silence, pairs wrongly or executes.

    python benchmarks/faults.py [--cache runs/benchmarks] [--faults header_bit,bomb] [--limit-seconds 200]

One hundred captioned images in two shards are written by each loader's own writer, damaged, and read again in a
process of its own. Peers are installed into <cache>/<peer>, each into its own virtual environment. Prints a table;
a run of all faults writes benchmarks/results/faults.json and docs/faults.md. Samples and damage: fault_cases.py; the
loaders: fault_loaders.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from environment import ROOT, describe
from fault_cases import BAD, FAULTS, FORMATS, SAMPLES, Content, Fault, make_samples, write_source

from dalle_scale import log
from dalle_scale.types import UserError

RESULT, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "faults.md"
PROGRAM = Path(__file__).with_name("fault_loaders.py")
TORCH = "torch==2.13.0"  # the build that this project's own environment has; an unpinned one may pull gigabytes
PEERS = {  # name -> what pip installs, in turn; a peer itself without what it would only need for remote places
    "webdataset": (("webdataset==1.0.2", "pillow"),),
    "mosaicml-streaming": (
        (TORCH, "numpy<2.2", "xxhash<4", "transformers<5", "zstd", "Brotli", "python-snappy", "catalogue", "pillow"),
        ("--no-deps", "torchvision==0.28.0", "mosaicml-streaming==0.13.0"),
    ),
    "litdata": (
        (
            TORCH,
            "numpy",
            "lightning-utilities",
            "filelock",
            "requests",
            "boto3",
            "tifffile",
            "obstore",
            "pillow",
            "tqdm",
        ),
        ("--no-deps", "litdata==0.2.76"),
    ),
}


@dataclass(frozen=True)
class Column:
    """One way to read: a column of the table."""

    reader: str  # in fault_loaders.READERS
    writer: str  # in fault_loaders.WRITERS
    title: str


COLUMNS = (
    Column("dalle_scale", "dalle_scale", "dalle_scale"),
    Column("dalle_scale_opened", "dalle_scale", "dalle_scale, damaged after opening"),
    Column("webdataset", "webdataset", "webdataset 1.0.2"),
    Column("mosaicml-streaming", "mosaicml-streaming", "mosaicml-streaming 0.13.0"),
    Column("mosaicml-streaming_checked", "mosaicml-streaming", "mosaicml-streaming, validate_hash"),
    Column("litdata", "litdata", "litdata 0.2.76"),
)


@dataclass
class Outcome:
    """What became of the samples; every sample is counted once, `duplicated` are deliveries beyond the first."""

    state: str  # "complete", "stopped" (an exception), "killed", "hung", "not applicable", "not installed"
    intact: int = 0
    damaged: int = 0  # delivered with other content, nothing said about it
    half: int = 0  # delivered without image or caption
    mispaired: int = 0  # image with the caption of another
    lost_with_message: int = 0
    lost_with_log: int = 0  # the caller is told nothing, but there is an error in the log
    lost_in_silence: int = 0
    duplicated: int = 0
    escaping_keys: int = 0
    code_executed: bool = False
    messages: list[str] = field(default_factory=list)  # the first three
    error: str = ""
    seconds: float = 0.0  # from the first sample or message to the end
    peak_bytes: int = 0  # memory of the process


def main() -> None:
    """Run all cases, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks"), help="where peers are installed")
    parser.add_argument("--faults", help="names, with commas; default: all. Writes no result")
    parser.add_argument("--limit-seconds", type=float, default=200, help="after which a reader counts as hung")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if args.faults is None or fault.name in ["none", *args.faults.split(",")]]
    if args.faults and (unknown := set(args.faults.split(",")) - {fault.name for fault in FAULTS}):
        raise UserError(f"--faults: {', '.join(sorted(unknown))}: choose from {', '.join(f.name for f in FAULTS)}")
    pythons = {"dalle_scale": sys.executable} | {peer: install(peer, args.cache.resolve() / peer) for peer in PEERS}
    outcomes: dict[str, dict[str, Outcome]] = {column.reader: {} for column in COLUMNS}
    content = make_samples()
    with tempfile.TemporaryDirectory() as work:
        cases = [(fault, column) for fault in faults for column in COLUMNS]
        for fault, column in log.progress(cases, "faults", "cases"):
            bench = Bench(Path(work), pythons[column.writer], args.limit_seconds, content)
            outcome = outcomes[column.reader][fault.name] = bench.run(fault, column)
            if fault.kind == "none" and outcome.state != "not installed" and outcome.intact != SAMPLES:
                raise UserError(
                    f"{column.title}: does not read a sound data set, so no figure means anything: {outcome}"
                )
    print(table(faults, outcomes))
    if args.faults is None:
        RESULT.parent.mkdir(exist_ok=True)
        found = {reader: {name: asdict(outcome) for name, outcome in row.items()} for reader, row in outcomes.items()}
        result = {"samples": SAMPLES, "outcomes": found, **describe()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(page(faults, outcomes, result))
        print(f"wrote {RESULT.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")


def install(peer: str, folder: Path) -> str | None:
    """Path of the peer's python, None if it cannot be installed; what is there from an earlier run stays."""
    python = folder / "bin" / "python"
    wanted = json.dumps(PEERS[peer])
    stamp = folder / "installed.json"
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    log.say(f"{peer}: installing into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    steps = [[sys.executable, "-m", "venv", str(folder)]]
    steps += [[str(python), "-m", "pip", "install", "--quiet", *packages] for packages in PEERS[peer]]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            log.say(f"{peer}: not installed: {done.stderr.strip().splitlines()[-1:]}")
            return None
    stamp.write_text(wanted)
    return str(python)


@dataclass(frozen=True)
class Bench:
    """Makes a case below `work` and runs it with one python."""

    work: Path
    python: str | None
    limit_seconds: float
    content: Content

    def run(self, fault: Fault, column: Column) -> Outcome:
        """One fault at one loader."""
        opened = column.reader == "dalle_scale_opened"
        if (column.writer in FORMATS and not fault.for_formats) or (opened and fault.kind not in ("none", "damage")):
            return Outcome("not applicable")
        if opened and fault.name == "pipe_address":
            return Outcome("not applicable")
        if self.python is None:
            return Outcome("not installed")
        folder, mark = self.work / "case", self.work / "executed"
        shutil.rmtree(folder, ignore_errors=True)
        content = fault.samples(self.content) if fault.samples else self.content
        writes_pickle = fault.name == "pickle" and column.writer in FORMATS
        if fault.kind == "foreign" and not writes_pickle:
            folder.mkdir()
        else:
            written = self.work / f"{column.writer}-{fault.name if fault.samples or writes_pickle else 'sound'}"
            if not written.exists():
                self._write(column.writer, content, written, str(mark) if writes_pickle else "")
            shutil.copytree(written, folder)
        sound = folder / "sound"
        if opened:
            shutil.copytree(folder, self.work / "copy")
            (self.work / "copy").rename(sound)
        mark.unlink(missing_ok=True)  # writers may have loaded what they pickled
        if fault.apply:
            fault.apply(column.writer, folder, content, mark)
        sleeps = column.reader == "webdataset" and fault.name == "undecodable"  # with its own handler, which sleeps
        outcome = self._read("webdataset_warning" if sleeps else column.reader, folder, content)
        outcome.code_executed = mark.exists()
        return outcome

    def _write(self, writer: str, content: Content, folder: Path, mark: str) -> None:
        source = self.work / "source"
        shutil.rmtree(source, ignore_errors=True)
        write_source(content, source)
        command = [str(self.python), str(PROGRAM), "write", writer, str(source), str(folder), *filter(None, [mark])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=self.work)
        if done.returncode:
            raise UserError(f"{writer}: its writer failed: {done.stderr.strip().splitlines()[-1]}")

    def _read(self, reader: str, folder: Path, content: Content) -> Outcome:
        report = self.work / "report.jsonl"
        report.write_text("")
        command = [str(self.python), str(PROGRAM), "read", reader, str(folder), str(report)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
            cwd=self.work,
            start_new_session=True,
        )
        try:
            process.wait(self.limit_seconds)
            state = "killed"
        except subprocess.TimeoutExpired:
            state = "hung"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = report.read_text().replace(f"{self.work}/", "").splitlines()
        return classify([json.loads(line) for line in lines], content, state)


def environment() -> dict[str, str]:
    """Of the processes: one thread, the project importable for its own loader."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def classify(rows: list[dict[str, Any]], content: Content, state: str) -> Outcome:
    """Account for every sample.

    Args:
        rows: what the reader reported.
        state: what to say if it did not report its end.
    """
    keys = list(content)
    by_image = {hashlib.sha256(image).hexdigest(): number for number, (image, _) in enumerate(content.values())}
    by_caption = {caption.decode(): number for number, (_, caption) in enumerate(content.values())}
    states: dict[int, str] = {}
    delivered: Counter[int] = Counter()
    rank = ("half", "damaged", "mispaired", "intact")
    escaping = 0
    for row in (row for row in rows if "key" in row):
        escaping += row["key"].startswith("/") or ".." in row["key"].split("/")
        image, caption = by_image.get(row["image"]), by_caption.get(row["caption"])
        number = image if image is not None else caption
        if number is None:
            number = keys.index(row["key"]) if row["key"] in keys else None
        if number is None:
            continue
        if row["image"] is None or row["caption"] is None:
            found = "half"
        elif image is None or caption is None:
            found = "damaged"
        else:
            found = "intact" if image == caption else "mispaired"
        delivered[number] += 1
        states[number] = max(states.get(number, found), found, key=rank.index)
    messages = [row["message"] for row in rows if "message" in row]
    end = next((row for row in rows if "ended" in row), {"ended": state})
    counts = Counter(states.values())
    lost = len(content) - len(states)
    logged = [row["logged"] for row in rows if "logged" in row]
    way = "silence"
    if messages or end["ended"] != "complete":
        way = "message"
    elif logged:
        way = "log"
    return Outcome(
        end["ended"],
        **{name: counts[name] for name in rank},
        lost_with_message=lost if way == "message" else 0,
        lost_with_log=lost if way == "log" else 0,
        lost_in_silence=lost if way == "silence" else 0,
        duplicated=sum(delivered.values()) - len(delivered),
        escaping_keys=escaping,
        messages=(messages + logged)[:3],
        error=end.get("error", ""),
        seconds=round(end.get("seconds", 0.0), 3),
        peak_bytes=end.get("peak_bytes", 0),
    )


def cell(outcome: Outcome) -> str:
    """An outcome in a few words."""
    if outcome.state.startswith("not "):
        return outcome.state
    parts = [f"{outcome.intact}"]
    if outcome.state != "complete":
        parts = [f"{outcome.intact}, then {outcome.state}" if outcome.intact else f"{outcome.state} before the first"]
    elif outcome.lost_with_message:
        parts.append(f"{outcome.lost_with_message} lost, reported")
    elif outcome.lost_with_log:
        parts.append(f"**{outcome.lost_with_log} lost, only logged**")
    parts += [f"**{outcome.lost_in_silence} lost in silence**"] * (outcome.lost_in_silence > 0)
    names = {"damaged": "damaged", "half": "in half", "mispaired": "mis-paired", "duplicated": "twice"}
    parts += [f"**{getattr(outcome, name)} {word}**" for name, word in names.items() if getattr(outcome, name)]
    parts += [f"**{outcome.escaping_keys} keys passed through**"] * (outcome.escaping_keys > 0)
    parts += ["**code executed**"] * outcome.code_executed
    return "; ".join(parts)


def measures(fault: Fault, outcomes: dict[str, Outcome]) -> str:
    """What else a fault costs, where that is the point of it."""
    outcome, sound = outcomes[fault.name], outcomes["none"]
    if outcome.state.startswith("not "):
        return ""
    if fault.name == "bomb":
        return f"; {max(0, outcome.peak_bytes - sound.peak_bytes) / (1 << 20):,.0f} MiB more memory"
    if fault.name == "undecodable" and outcome.state == "complete":
        return f"; {max(0.0, outcome.seconds - sound.seconds) / len(BAD):.3f} s for each"
    return ""


def table(faults: list[Fault], outcomes: dict[str, dict[str, Outcome]]) -> str:
    """The Markdown table."""
    lines = [["fault", *(column.title for column in COLUMNS)], ["---"] * (1 + len(COLUMNS))]
    for fault in faults:
        found = [cell(outcomes[c.reader][fault.name]) + measures(fault, outcomes[c.reader]) for c in COLUMNS]
        lines.append([fault.title, *found])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(faults: list[Fault], outcomes: dict[str, dict[str, Outcome]], result: dict[str, Any]) -> str:
    """docs/faults.md."""
    return f"""# How loaders treat damaged data

Each loader's own writer writes {SAMPLES} captioned images into two shards. Each fault is applied at the corresponding
place of its format, and the shards are read again in order, in a separate process. Foreign tars go to this project
through `data_tools/build_shards.py`. webdataset runs with a handler that records each error and continues, in the last
row with its own `warn_and_continue`. mosaicml-streaming and litdata return bytes, which Pillow decodes as their own
decoders would; an exception there ends the reading ("stopped"), as here if a data set is refused when it is opened.

A plain number counts the samples that arrived with their own caption and their own bytes. "reported": the caller got at
least one message. Bold: lost or changed without a report, or a thing that must not happen. "not applicable": the format
cannot have the fault.

Repeat with `{result["command"]}` (commit {result["commit"]}, {result["date"]}, {result["hardware"]}). Messages, seconds
and memory of every case are in [benchmarks/results/faults.json](../benchmarks/results/faults.json).

{table(faults, outcomes)}
"""


if __name__ == "__main__":
    log.guarded(main)
