"""Loaders as `benchmarks/faults.py` runs them: each writes and reads in a process and an environment of its own.

    python benchmarks/fault_loaders.py write LOADER SOURCE FOLDER [SENTINEL]
    python benchmarks/fault_loaders.py read LOADER FOLDER OUT

SOURCE is a folder of `<key>.jpg` and `<key>.txt`; every loader makes two shards of its own format of them, with its
own writer. With SENTINEL the samples also hold a pickle that makes a file of that name when it is loaded.
`read` writes one line of JSON to OUT for each sample, each message to the caller, each error that is only logged, and
the end; it is flushed, so that what a process did before it died is known. Nothing of dalle_scale is imported here
except by its own loader.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARDS = 2
Say = Callable[[str], None]
Row = dict[str, Any]  # "key", and "jpg" and "txt" as bytes where the sample has them


class Malicious:
    """Pickled, it is a call of `open(path, "w")` that happens when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def main(action: str, loader: str, source: str, out: str, sentinel: str = "") -> None:
    """Write a data set or read one."""
    if action == "write":
        WRITERS[loader](samples(Path(source)), Path(out), sentinel)
        return
    with Path(out).open("w") as report:
        started: list[float] = []  # when the first sample or message was there: imports are over

        def record(**row: Any) -> None:
            started or started.append(time.perf_counter())
            report.write(json.dumps(row) + "\n")
            report.flush()

        class ToReport(logging.Handler):
            def emit(self, entry: logging.LogRecord) -> None:
                cause = entry.exc_info[1] if entry.exc_info else ""
                record(logged=f"{entry.getMessage()[:100]} {cause}"[:300])

        logging.getLogger().addHandler(ToReport(logging.ERROR))
        try:
            for row in READERS[loader](Path(source), lambda text: record(message=text)):
                image, caption = row.get("jpg"), row.get("txt")
                record(
                    key=row["key"],
                    image=None if image is None else hashlib.sha256(image).hexdigest(),
                    caption=None if caption is None else caption.decode(errors="replace"),
                )
            ending = {"ended": "complete"}
        except BaseException as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            ending = {"ended": "stopped", "error": text}
        seconds = time.perf_counter() - started[0] if started else 0.0
        record(**ending, seconds=seconds, peak_bytes=peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Of this program: what getrusage says holds the peak of the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def samples(source: Path) -> list[tuple[str, bytes, bytes]]:
    """(key, image, caption) of every sample."""
    return [
        (path.stem, path.read_bytes(), path.with_suffix(".txt").read_bytes()) for path in sorted(source.glob("*.jpg"))
    ]


def decode_with_pillow(image: bytes) -> None:
    """What users of loaders that hand out bytes do next."""
    from PIL import Image

    Image.open(io.BytesIO(image)).convert("RGB")


# ---- this project ----


def write_dalle_scale(content: list[tuple[str, bytes, bytes]], out: Path, sentinel: str) -> None:
    """Tars with their manifest."""
    from dalle_scale.curation.shard_writer import ShardWriter

    with ShardWriter(out, len(content) // SHARDS) as writer:
        for key, image, caption in content:
            writer.add(key, {"jpg": image, "txt": caption})


def read_dalle_scale(folder: Path, say: Say) -> Iterator[Row]:
    """Every sample through the manifest. A tar of someone else's is first built into a data set, as a user would."""
    from dalle_scale.data.manifest import Manifest

    if not (folder / "manifest.parquet").exists():
        folder = build(folder, say)
    return read_manifest(Manifest.open(folder), say)


def read_dalle_scale_opened(folder: Path, say: Say) -> Iterator[Row]:
    """The same where the damage comes after the data set was opened: sound files stand in `folder/sound` until then."""
    from dalle_scale.data.manifest import Manifest

    manifest = Manifest.open(folder / "sound")
    for path in (folder / "sound").glob("*.tar"):
        path.unlink()
    for path in folder.glob("*.tar"):
        path.rename(folder / "sound" / path.name)
    return read_manifest(manifest, say)


def read_manifest(manifest: Any, say: Say) -> Iterator[Row]:
    """Read and decode."""
    from dalle_scale.data.decode import BadSample, decode
    from dalle_scale.data.reader import Reader

    reader = Reader(manifest)
    for sample in range(manifest.num_samples):
        try:
            image, caption = reader.read_image(sample), reader.read(sample, "txt")
            decode(image)
        except BadSample as error:
            say(f"{manifest.key(sample)}: {error}")
            continue
        yield {"key": manifest.key(sample), "jpg": image, "txt": caption}


def build(folder: Path, say: Say) -> Path:
    """data_tools/build_shards.py on foreign tars; its ledger is what it says."""
    out = folder / "built"
    program = Path(__file__).resolve().parents[1] / "data_tools" / "build_shards.py"
    command = [sys.executable, str(program), str(folder), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"build_shards.py: {done.stderr.strip().splitlines()[-1]}")
    for line in (out / "ledger.jsonl").read_text().splitlines():
        say(line)
    return out / "train"


# ---- webdataset ----


def write_webdataset(content: list[tuple[str, bytes, bytes]], out: Path, sentinel: str) -> None:
    """Tars by its ShardWriter."""
    import webdataset

    out.mkdir(parents=True)
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=len(content) // SHARDS, verbose=0) as writer:
        for key, image, caption in content:
            writer.write({"__key__": key, "jpg": image, "txt": caption})


def read_webdataset(folder: Path, say: Say) -> Iterator[Row]:
    """All tars in order; a handler that tells and continues, so that what is lost without a word is its own doing."""

    def handler(error: Exception) -> bool:
        say(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return True

    return webdataset_rows(folder, handler)


def read_webdataset_warning(folder: Path, say: Say) -> Iterator[Row]:
    """The same with its own `warn_and_continue`."""
    import warnings

    import webdataset

    warnings.showwarning = lambda message, *unused: say(str(message)[:200])  # type: ignore[assignment]
    warnings.simplefilter("always")
    return webdataset_rows(folder, webdataset.warn_and_continue)


def webdataset_rows(folder: Path, handler: Callable[[Exception], bool]) -> Iterator[Row]:
    """Its usual pipeline: read, decode."""
    import webdataset

    listed = folder / "urls.json"
    urls = json.loads(listed.read_text()) if listed.exists() else sorted(map(str, folder.glob("*.tar")))
    pipeline = webdataset.WebDataset(urls, shardshuffle=False, handler=handler, empty_check=False)
    pipeline = pipeline.map(lambda sample: {**sample, "__raw__": dict(sample)}).decode("pilrgb", handler=handler)
    for sample in pipeline:
        raw = sample["__raw__"]
        yield {"key": raw["__key__"], **{name: raw[name] for name in ("jpg", "txt") if name in raw}}


# ---- mosaicml-streaming ----


def import_streaming() -> tuple[Any, Any]:
    """Where torchvision's compiled operators do not fit the installed torch, two have to be declared to import it."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    found = importlib.util.find_spec("torchvision")
    assert found is not None and found.submodule_search_locations is not None
    try:
        torch.ops.load_library(str(Path(found.submodule_search_locations[0]) / "_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import streaming
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # a process before that crashed left some
    return streaming, library  # the declarations live as long as the library object


def write_mosaic(content: list[tuple[str, bytes, bytes]], out: Path, sentinel: str) -> None:
    """MDS shards with hashes."""
    streaming, _library = import_streaming()
    columns = {"key": "str", "jpg": "bytes", "txt": "bytes", **({"extra": "pkl"} if sentinel else {})}
    total = sum(len(key) + len(image) + len(caption) + 16 for key, image, caption in content)
    limit = total // SHARDS + 2048  # bytes; the second shard takes what the first leaves
    with streaming.MDSWriter(out=str(out), columns=columns, hashes=["sha1"], size_limit=limit) as writer:
        for key, image, caption in content:
            extra = {"extra": Malicious(sentinel)} if sentinel else {}
            writer.write({"key": key, "jpg": image, "txt": caption, **extra})


def read_mosaic(folder: Path, say: Say) -> Iterator[Row]:
    """Local shards, as they are."""
    return mosaic_rows({"local": str(folder)})


def read_mosaic_checked(folder: Path, say: Say) -> Iterator[Row]:
    """As from a remote place, with the check of hashes that it offers."""
    return mosaic_rows({"remote": str(folder), "local": str(folder / "cache"), "validate_hash": "sha1"})


def mosaic_rows(options: dict[str, str]) -> Iterator[Row]:
    """In order; what it raises ends the reading."""
    streaming, _library = import_streaming()
    for sample in streaming.StreamingDataset(shuffle=False, batch_size=1, num_canonical_nodes=1, **options):
        decode_with_pillow(sample["jpg"])
        yield {name: sample[name] for name in ("key", "jpg", "txt")}


# ---- litdata ----


def make_litdata_item(task: tuple[str, bytes, bytes, str]) -> dict[str, Any]:
    """One sample; runs in a process of litdata's."""
    key, image, caption, sentinel = task
    item: dict[str, Any] = {"key": key, "jpg": image, "txt": caption}
    return {**item, "extra": Malicious(sentinel)} if sentinel else item


def write_litdata(content: list[tuple[str, bytes, bytes]], out: Path, sentinel: str) -> None:
    """Chunks by `optimize`."""
    import litdata

    tasks = [(*sample, sentinel) for sample in content]
    size = len(content) // SHARDS
    litdata.optimize(fn=make_litdata_item, inputs=tasks, output_dir=str(out), chunk_size=size, num_workers=1)


def read_litdata(folder: Path, say: Say) -> Iterator[Row]:
    """In order; what it raises ends the reading."""
    import litdata

    for sample in litdata.StreamingDataset(input_dir=str(folder), shuffle=False):
        row = {"key": sample["key"], "jpg": bytes(sample["jpg"]), "txt": bytes(sample["txt"])}
        decode_with_pillow(row["jpg"])
        yield row


WRITERS = {
    "dalle_scale": write_dalle_scale,
    "webdataset": write_webdataset,
    "mosaicml-streaming": write_mosaic,
    "litdata": write_litdata,
}
READERS = {
    "dalle_scale": read_dalle_scale,
    "dalle_scale_opened": read_dalle_scale_opened,
    "webdataset": read_webdataset,
    "webdataset_warning": read_webdataset_warning,
    "mosaicml-streaming": read_mosaic,
    "mosaicml-streaming_checked": read_mosaic_checked,
    "litdata": read_litdata,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
