"""What a data set costs that is a hundred times larger, and whether reading grows memory.

    python benchmarks/data_scale.py

Two measurements, each in processes of its own:

    resume   a data set of 10,000 samples, and one of 250 million (25,000 shards that are one tar and one index under
             25,000 names): size of the loader's state, seconds from opening to the first batch in the middle of an
             epoch, and the memory that this took
    flat     a million samples of codes, and 20 epochs of a small set of images: memory and file descriptors along
             the way

Writes benchmarks/results/data_scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
SHARD_SAMPLES = 10_000
BATCH = 256
NUM_CODES = 16


def main() -> None:
    """Make the data sets, measure in fresh processes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/data_scale"))
    parser.add_argument("--shards", type=int, default=25_000, help="of the large data set, 10,000 samples each")
    parser.add_argument("--flat-samples", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "data_scale.json")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "FOLDER", "COUNT"), help="used by the program itself")
    args = parser.parse_args()
    if args.measure:
        what, folder, count = args.measure
        print(json.dumps({"resume": resume, "flat": flat}[what](folder, int(count))))
        return
    from environment import describe

    shutil.rmtree(args.folder, ignore_errors=True)
    write_codes(args.folder / "small", 1)
    write_copies(args.folder / "small", args.folder / "large", args.shards)
    write_codes(args.folder / "million", -(-args.flat_samples // SHARD_SAMPLES))
    write_images(args.folder / "images", 512)
    epoch_batches = -(-512 // BATCH)
    result = {
        "resume": {
            f"{SHARD_SAMPLES * shards}": measured("resume", args.folder / name, 0)
            for name, shards in (("small", 1), ("large", args.shards))
        },
        "flat": {
            f"{args.flat_samples} samples": measured("flat", args.folder / "million", args.flat_samples // BATCH),
            f"{args.epochs} epochs": measured("flat", args.folder / "images", args.epochs * epoch_batches),
        },
        **describe(),
    }
    print(json.dumps(result, indent=1))
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(args.folder)


def measured(what: str, folder: Path, count: int) -> Any:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(folder), str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def open_data(folder: str) -> Any:
    """The stream of a data set, images or codes."""
    from dalle_scale.config import DataConfig
    from dalle_scale.data.pipeline import open_stream
    from dalle_scale.types import BatchSpec

    inputs = BatchSpec(image_size=32) if folder.endswith("images") else BatchSpec(num_codes=NUM_CODES, code_vocab=8192)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "rank": 0, "world_size": 1}
    return open_stream(DataConfig(train=folder), folder, inputs, seed=0, train=True, ledger=None, **sizes)


def resume(folder: str, _: int) -> dict[str, Any]:
    """Open and continue in the middle of an epoch, everything imported already."""
    import dalle_scale.data.pipeline  # noqa: F401 (its import is not what is measured)

    before, started = memory_mib(), time.perf_counter()
    stream = open_data(folder)
    middle = stream.batches_per_epoch // 2
    [batch] = next(stream.batches(middle, middle + 1))
    seconds = time.perf_counter() - started
    assert bool((batch["weight"] == 1).all())
    state = json.dumps(stream.state(middle)).encode()
    return {
        "state_bytes": len(state),
        "first_batch_seconds": round(seconds, 3),
        "memory_mib": round(memory_mib() - before, 1),
    }


def flat(folder: str, batches: int) -> list[dict[str, Any]]:
    """Memory and open files at ten places on the way."""
    stream = open_data(folder)
    rows = []
    marks = {round(batches * tenth / 10) for tenth in range(1, 11)}
    for number, _ in enumerate(stream.batches(0, batches), start=1):
        if number in marks:
            files = len(os.listdir("/proc/self/fd"))
            rows.append({"samples": number * BATCH, "memory_mib": round(memory_mib(), 1), "open_files": files})
    return rows


def memory_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def write_codes(folder: Path, shards: int) -> None:
    """Shards of 10,000 samples of codes."""
    from dalle_scale import log
    from dalle_scale.curation.shard_writer import Shard, commit
    from dalle_scale.data.codes import MEMBER, pack

    for number in log.progress(range(shards), f"write {folder.name}", "shards", shards):
        shard = Shard(folder, number)
        values = np.random.default_rng(number).integers(0, 8192, (SHARD_SAMPLES, NUM_CODES))
        for row, codes in enumerate(values):
            shard.add(f"{number * SHARD_SAMPLES + row:09d}", {MEMBER: pack(codes)})
        shard.close()
    commit(folder, {"kind": "codes", "vocab": 8192, "grids": [4]})


def write_copies(source: Path, folder: Path, shards: int) -> None:
    """A data set whose shards are all the one of `source`."""
    from dalle_scale.curation.shard_writer import commit, shard_name
    from dalle_scale.data.manifest import index_path

    (folder / "index").mkdir(parents=True)
    os.link(source / shard_name(0), folder / shard_name(0))
    for number in range(shards):
        os.link(index_path(source, 0), index_path(folder, number))
    commit(folder, {"kind": "codes", "vocab": 8192, "grids": [4]})


def write_images(folder: Path, count: int) -> None:
    """Images of 32 x 32 pixels."""
    from io import BytesIO

    from PIL import Image

    from dalle_scale.curation.shard_writer import ShardWriter

    with ShardWriter(folder) as writer:
        for number in range(count):
            file = BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            writer.add(f"{number:06d}", {"jpg": file.getvalue()})


if __name__ == "__main__":
    main()
