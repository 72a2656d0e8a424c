"""The samples and the damage of `benchmarks/faults.py`: every fault is a change of the files of a data set.

A fault of kind "damage" changes the files that a loader's own writer made, at the corresponding place of its format.
A fault of kind "foreign" is tars that somebody else made, a fault of kind "samples" is other samples for the writer.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SAMPLES, HIT = 100, 30  # how many there are, and which one most faults hit
BAD = range(5, 100, 10)  # samples that cannot be decoded, in the fault about time lost
FORMATS = {"mosaicml-streaming": "*.mds", "litdata": "*.bin"}  # others: *.tar
Content = dict[str, tuple[bytes, bytes]]  # key -> image, caption
Entry = tuple[str, bytes]


@dataclass(frozen=True)
class Fault:
    """One fault.

    `apply` gets the loader's name, the folder of its data set, the sound samples and where code that is executed shall
    leave its mark.
    """

    name: str
    title: str
    kind: str  # "none", "damage", "foreign" or "samples"
    apply: Callable[[str, Path, Content, Path], None] | None = None
    samples: Callable[[Content], Content] | None = None
    for_formats: bool = False  # whether it means something for formats other than tar


def make_samples() -> Content:
    """Noise images as JPEG, each with a caption of its own."""
    content = {}
    for number in range(SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        content[f"{number:05d}"] = (file.getvalue(), f"an image with the number {number:05d}".encode())
    return content


def write_source(content: Content, folder: Path) -> None:
    """Samples as `<key>.jpg` and `<key>.txt`."""
    folder.mkdir(parents=True)
    for key, (image, caption) in content.items():
        (folder / f"{key}.jpg").write_bytes(image)
        (folder / f"{key}.txt").write_bytes(caption)


# ---- damage: places in the files that a writer made ----


def shards(loader: str, folder: Path) -> list[Path]:
    """The loader's two files of samples."""
    found = sorted(folder.glob(FORMATS.get(loader, "*.tar")))
    assert len(found) == 2, f"{folder}: {len(found)} shards"
    return found


@dataclass(frozen=True)
class Place:
    """Where the sample that is hit lies in the first shard, in bytes from its start."""

    boundary: int  # ends of what can be cut off without cutting a member (tar) or a sample (others)
    header: int  # inside what tells where the payload is
    header_bytes: int
    image: int
    length: int  # of the image


def place(loader: str, path: Path, content: Content) -> Place:
    """Find it by what it holds; formats other than tar put three sizes of 4 bytes before a sample."""
    key = f"{HIT:05d}"
    image = content[key][0]
    at = path.read_bytes().index(image)
    if loader == "mosaicml-streaming":
        return Place(at - 12, at - 12, 12, at, len(image))
    if loader == "litdata":
        return Place(at - 12 - len(key), at - 12 - len(key), 12, at, len(image))
    with tarfile.open(path) as tar:
        text = tar.getmember(f"{key}.txt")
    return Place(text.offset, text.offset_data - 512, 512, at, len(image))


def flip(path: Path, position: int, bit: int) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def flip_header(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """A digit of the size in a tar header; elsewhere the offset of the sample in the table at the file's start."""
    path = shards(loader, folder)[0]
    spot = place(loader, path, content)
    if loader in FORMATS:
        flip(path, 4 * (1 + HIT) + 1, 3)  # the table follows the number of samples
    else:
        flip(path, spot.header + 130, 0)


def cut(where: str) -> Callable[[str, Path, Content, Path], None]:
    """The first shard ends early."""

    def apply(loader: str, folder: Path, content: Content, mark: Path) -> None:
        path = shards(loader, folder)[0]
        spot = place(loader, path, content)
        length = {
            "boundary": spot.boundary,
            "header": spot.header + spot.header_bytes // 2 - 1,
            "payload": spot.image + spot.length // 2,
        }[where]
        path.write_bytes(path.read_bytes()[:length])

    return apply


def flip_payload(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """A bit in the middle of the image; the first one that leaves an image which can be decoded."""
    path = shards(loader, folder)[0]
    spot = place(loader, path, content)
    image = content[f"{HIT:05d}"][0]
    for position in range(len(image) // 2, len(image)):
        changed = bytearray(image)
        changed[position] ^= 1
        if decodes_to_something_else(bytes(changed), image):
            flip(path, spot.image + position, 0)
            return
    raise AssertionError("no bit found")


def decodes_to_something_else(changed: bytes, image: bytes) -> bool:
    """Whether a strict decoder takes the changed file and shows another image."""
    from dalle_scale.data.decode import BadSample, decode

    try:
        return not np.array_equal(decode(changed), decode(image))
    except BadSample:
        return False


def remove_shard(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """The second shard is gone, and whoever lists tars by name still asks for it."""
    path = shards(loader, folder)[1]
    if loader == "webdataset":
        (folder / "urls.json").write_text(json.dumps([str(shard) for shard in shards(loader, folder)]))
    path.unlink()


def replace_shard(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """The second shard is a copy of the first."""
    first, second = shards(loader, folder)
    shutil.copyfile(first, second)


# ---- foreign tars ----


def write_tar(path: Path, entries: Iterable[Entry]) -> None:
    """A tar of these files, names as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(content: Content, keys: Iterable[str]) -> list[Entry]:
    """Image and caption of each key, side by side."""
    return [(f"{key}.{kind}", data) for key in keys for kind, data in zip(("jpg", "txt"), content[key], strict=True)]


def foreign(change: Callable[[list[Entry]], list[Entry]]) -> Callable[[str, Path, Content, Path], None]:
    """Two tars, the first of which was changed."""

    def apply(loader: str, folder: Path, content: Content, mark: Path) -> None:
        keys = list(content)
        write_tar(folder / "shard-000000.tar", change(members(content, keys[: SAMPLES // 2])))
        write_tar(folder / "shard-000001.tar", members(content, keys[SAMPLES // 2 :]))

    return apply


def renamed(names: dict[str, str]) -> Callable[[list[Entry]], list[Entry]]:
    """Samples under other keys."""
    return lambda entries: [(f"{names.get(name[:5], name[:5])}{name[5:]}", data) for name, data in entries]


def drop_caption(entries: list[Entry]) -> list[Entry]:
    """One caption is not there."""
    return [entry for entry in entries if entry[0] != f"{HIT:05d}.txt"]


def interleave(entries: list[Entry]) -> list[Entry]:
    """All images, then all captions."""
    return sorted(entries, key=lambda entry: entry[0].endswith(".txt"))


def cut_inside_caption(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """The first tar ends inside the caption of its last sample, the second starts with another caption of that key."""
    keys = list(content)
    last = keys[SAMPLES // 2 - 1]
    first = folder / "shard-000000.tar"
    write_tar(first, members(content, keys[: SAMPLES // 2]))
    with tarfile.open(first) as tar:
        cut_at = tar.getmember(f"{last}.txt").offset_data + 4
    first.write_bytes(first.read_bytes()[:cut_at])
    other = members(content, keys[SAMPLES // 2 :])
    write_tar(folder / "shard-000001.tar", [(f"{last}.txt", content[keys[SAMPLES // 2]][1]), *other])


def add_pickle(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """A member with the extension of a pickle that makes a file when it is loaded. Formats other than tar get theirs
    from their writer."""
    import pickle

    from fault_loaders import Malicious

    if loader not in FORMATS:
        extra = (f"{HIT:05d}.pyd", pickle.dumps(Malicious(str(mark))))
        at = 2 * HIT + 2
        foreign(lambda entries: [*entries[:at], extra, *entries[at:]])(loader, folder, content, mark)


def pipe_address(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """The first shard's address is a shell command."""
    command = f"pipe:touch {mark}; cat {shards(loader, folder)[0]}"
    if loader == "webdataset":
        (folder / "urls.json").write_text(json.dumps([command, str(shards(loader, folder)[1])]))
        return
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    addresses = pa.array([command, *table["url"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("url"), "url", addresses), path)


# ---- other samples ----


def with_bomb(content: Content) -> Content:
    """One image is a small file of 169 million pixels, just below what Pillow refuses."""
    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    key = f"{HIT:05d}"
    return {**content, key: (file.getvalue(), content[key][1])}


def with_undecodable(content: Content) -> Content:
    """Ten images are no images."""
    bad = {key for number, key in enumerate(content) if number in BAD}
    return {
        key: (b"\xff\xd8\xff" + bytes(200) if key in bad else sample[0], sample[1]) for key, sample in content.items()
    }


def flip_first_header(loader: str, folder: Path, content: Content, mark: Path) -> None:
    """In tars with one header a member; webdataset's own writer makes two."""
    foreign(list)(loader, folder, content, mark)
    flip_header(loader, folder, content, mark)


HOSTILE = {"00040": "../../escaped", "00041": "/absolute/escaped"}
DOTTED = {"00040": "picture_1.0", "00041": "picture_1.5"}
FAULTS = (
    Fault("none", "none", "none", for_formats=True),
    Fault("header_bit", "one bit of a header flipped", "damage", flip_header, for_formats=True),
    Fault("cut_at_boundary", "shard truncated between two members", "damage", cut("boundary"), for_formats=True),
    Fault("cut_in_header", "shard truncated inside a header", "damage", cut("header"), for_formats=True),
    Fault("cut_in_payload", "shard truncated inside an image", "damage", cut("payload"), for_formats=True),
    Fault("payload_bit", "one bit of an image flipped", "damage", flip_payload, for_formats=True),
    Fault("missing_shard", "a shard is missing", "damage", remove_shard, for_formats=True),
    Fault("replaced_shard", "a shard replaced by a copy of the other", "damage", replace_shard, for_formats=True),
    Fault("foreign_header_bit", "one bit of a header flipped, tar of another writer", "foreign", flip_first_header),
    Fault("duplicate_key", "two samples with one key", "foreign", foreign(renamed({"00041": "00040"}))),
    Fault("dotted_keys", "keys with dots", "foreign", foreign(renamed(DOTTED))),
    Fault("hostile_keys", "keys that point out of the folder", "foreign", foreign(renamed(HOSTILE))),
    Fault("missing_member", "a caption is missing", "foreign", foreign(drop_caption)),
    Fault("interleaved", "images first, captions after them", "foreign", foreign(interleave)),
    Fault(
        "cut_in_caption",
        "shard truncated inside a caption, the next begins with that key",
        "foreign",
        cut_inside_caption,
    ),
    Fault("pickle", "a pickle among the members", "foreign", add_pickle, for_formats=True),
    Fault("pipe_address", "a shell command as address of a shard", "damage", pipe_address),
    Fault("bomb", "a small file of 169 million pixels", "samples", samples=with_bomb, for_formats=True),
    Fault("undecodable", "ten images that cannot be decoded", "samples", samples=with_undecodable, for_formats=True),
)
