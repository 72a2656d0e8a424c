"""Rate of images out of shards, beside the decoder alone and beside other loaders.

    python benchmarks/data.py

Every loader delivers the same 256-pixel JPEGs as uint8 batches, in one process, from files in the page cache. They run
one after the other, round after round; a figure is the median over the rounds. `bare` is the limit: the same bytes,
held in memory, through simplejpeg and nothing else.

    bare         simplejpeg.decode_jpeg in a loop
    ours         manifest, pread, crc32, decode, crop, batch (dalle_scale.data.pipeline, workers: 0, threads: 1)
    threaded     the same with a decoding thread for each core (threads: 2), still one process
    webdataset   .decode("rgb8"), batched
    mosaic       mosaicml-streaming's StreamingDataset on its own format, batched; in an environment of its own
    imagefolder  torchvision's ImageFolder on files, batched

Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

SIDE, BATCH, QUALITY = 256, 64, 92
RESULTS = Path(__file__).parent / "results"
MOSAIC = ("mosaicml-streaming==0.13.0",)
LOADERS = ("bare", "ours", "threaded", "webdataset", "imagefolder", "mosaic")


def main() -> None:
    """Make the data, start one process a loader, let them run in turn, write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/data"), help="for the images")
    parser.add_argument("--without", nargs="*", default=[], choices=LOADERS, help="loaders to leave out")
    parser.add_argument("--loader", choices=LOADERS, help="be the process of this loader (used by the program itself)")
    args = parser.parse_args()
    if args.loader:
        serve(args.loader, args.folder)
        return
    from environment import describe, peer

    from dalle_scale import log

    prepare(args.folder, args.images)
    pythons = dict.fromkeys((name for name in LOADERS if name not in args.without), sys.executable)
    if "mosaic" in pythons:
        pythons["mosaic"] = str(peer("mosaic", *MOSAIC))
    processes = {name: start(python, name, args.folder) for name, python in pythons.items()}
    for process in processes.values():
        once(process)  # warms files and code
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for _ in log.progress(range(args.rounds), "measure", "rounds", args.rounds):
        for name, process in processes.items():
            seconds[name].append(once(process))
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    rates = {
        name: {
            "images_per_second": round(statistics.median(row["images"] / row["seconds"] for row in rows)),
            "of_bare": ratio(seconds["bare"], rows),
            "of_bare_by_processor_time": ratio(seconds["bare"], rows, "processor_seconds"),
        }
        for name, rows in seconds.items()
    }
    ours = {
        f"{mine}_over_{name}": ratio(rows, seconds[mine])
        for mine in ("ours", "threaded")
        if mine in seconds
        for name, rows in seconds.items()
        if name not in ("ours", "threaded")
    }
    result = {"images": args.images, "side": SIDE, "rounds": args.rounds, "loaders": rates, **ours, **describe()}
    print(json.dumps(result, indent=1))
    (RESULTS / "data.json").write_text(json.dumps(result, indent=1) + "\n")


def ratio(slower: list[dict[str, float]], faster: list[dict[str, float]], clock: str = "seconds") -> float:
    """How many times as fast `faster` is: the median over rounds, each of which ran both."""
    pairs = zip(slower, faster, strict=True)
    return round(statistics.median(a[clock] / b[clock] for a, b in pairs), 3)


def start(python: str, name: str, folder: Path) -> subprocess.Popen[str]:
    """The process of one loader."""
    command = [python, str(Path(__file__).resolve()), "--loader", name, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def once(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let a loader go through all images."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    row: dict[str, float] = json.loads(process.stdout.readline())
    return row


def serve(name: str, folder: Path) -> None:
    """Go through all images whenever a line comes; answer with the time it took."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # in the environment of a peer
    passes: Callable[[], Iterator[Any]] = globals()[f"{name}_pass"](folder)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not come between
    for _ in sys.stdin:
        started, used = time.perf_counter(), time.process_time()
        images = sum(len(batch) for batch in passes())
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - used
        row = {"images": images, "seconds": seconds, "processor_seconds": processor_seconds}
        print(json.dumps(row), file=answers, flush=True)


# --- the loaders: each returns a function that yields batches of images ---------------------------------------------


def bare_pass(folder: Path) -> Callable[[], Iterator[Any]]:
    """The decoder alone."""
    files = [path.read_bytes() for path in sorted((folder / "files" / "all").iterdir())]

    def passes() -> Iterator[Any]:
        for data in files:
            simplejpeg.decode_jpeg(data, colorspace="RGB")
            yield (1,)

    return passes


def threaded_pass(folder: Path) -> Callable[[], Iterator[Any]]:
    """This project's stream, on all cores."""
    return ours_pass(folder, threads=os.cpu_count() or 1)


def ours_pass(folder: Path, threads: int = 1) -> Callable[[], Iterator[Any]]:
    """This project's stream."""
    from dalle_scale.config import DataConfig
    from dalle_scale.data.pipeline import open_stream
    from dalle_scale.types import BatchSpec

    source = str(folder / "shards")
    stream = open_stream(
        DataConfig(train=source, threads=threads),
        source,
        BatchSpec(image_size=SIDE, augment="transformer"),
        seed=0,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        train=True,
        ledger=None,
    )
    epochs = iter(range(1 << 30))

    def passes() -> Iterator[Any]:
        first = next(epochs) * stream.batches_per_epoch
        for (batch,) in stream.batches(first, first + stream.batches_per_epoch):
            yield batch["image"][batch["weight"] > 0] if bool((batch["weight"] == 0).any()) else batch["image"]

    return passes


def webdataset_pass(folder: Path) -> Callable[[], Iterator[Any]]:
    """webdataset over the same tars."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))

    def passes() -> Iterator[Any]:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt")
        for images, _ in samples.batched(BATCH):
            yield np.asarray(images)

    return passes


def imagefolder_pass(folder: Path) -> Callable[[], Iterator[Any]]:
    """torchvision over files."""
    import torch

    from dalle_scale.nn.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    import torchvision

    to_tensor = torchvision.transforms.functional.pil_to_tensor
    dataset = torchvision.datasets.ImageFolder(str(folder / "files"), transform=to_tensor)

    def passes() -> Iterator[Any]:
        for at in range(0, len(dataset), BATCH):
            yield torch.stack([dataset[index][0] for index in range(at, min(at + BATCH, len(dataset)))])

    return passes


def mosaic_pass(folder: Path) -> Callable[[], Iterator[Any]]:
    """mosaicml-streaming over its own format."""
    from PIL import Image

    from dalle_scale.nn.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    from streaming import MDSWriter, StreamingDataset

    target = folder / "mosaic"
    shutil.rmtree(target, ignore_errors=True)
    with MDSWriter(out=str(target), columns={"image": "jpeg", "caption": "str"}) as writer:
        for path in sorted((folder / "files" / "all").iterdir()):
            writer.write({"image": Image.open(path), "caption": path.stem})  # it keeps the file's own bytes
    dataset = StreamingDataset(local=str(target), shuffle=False, batch_size=BATCH)

    def passes() -> Iterator[Any]:
        samples = iter(dataset)
        while batch := [np.asarray(sample["image"]) for sample in itertools.islice(samples, BATCH)]:
            yield np.stack(batch)

    return passes


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, images: int) -> None:
    """Shards by this project's writer, and the same images as files; what is there stays."""
    from dalle_scale import log
    from dalle_scale.curation.shard_writer import ShardWriter
    from dalle_scale.data.manifest import NAME, Manifest

    shards, files = folder / "shards", folder / "files" / "all"
    if (shards / NAME).exists() and Manifest.open(shards).num_samples == images:
        return
    shutil.rmtree(folder, ignore_errors=True)
    files.mkdir(parents=True)
    with ShardWriter(shards, samples_per_shard=512) as writer:
        for number in log.progress(range(images), "draw", "images", images):
            data = simplejpeg.encode_jpeg(natural(number), quality=QUALITY, colorsubsampling="420")
            writer.add(f"{number:06d}", {"jpg": data, "txt": f"image number {number}".encode()})
            (files / f"{number:06d}.jpg").write_bytes(data)


def natural(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image [H, W, 3] with the spectrum of photographs: amplitudes fall with frequency (Field, 1987)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width)) ** 1.1
    planes = []
    for strength in (1.0, 0.25, 0.25):  # brightness, two colour differences
        noise = rng.standard_normal(amplitude.shape) + 1j * rng.standard_normal(amplitude.shape)
        plane = np.fft.irfft2(noise * amplitude, (height, width))
        planes.append(strength * plane / plane.std())
    luma, blue, red = planes
    pixels = np.stack([luma + red, luma - (red + blue) / 2, luma + blue], axis=2) * 50 + 128
    return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
