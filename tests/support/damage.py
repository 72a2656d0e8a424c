"""Tars, and the damage that is done to them: every change is a function of the tar and a seed.

`make_files` gives the members of a sound set, `to_tar` their bytes. `header_flips`, `payload_flips` and `cuts` change
these bytes; `hostile` changes which members there are, and how they are called and ordered.
"""

from __future__ import annotations

import io
import pickle
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

BLOCK = tarfile.BLOCKSIZE
Files = list[tuple[str, bytes]]  # name and content of each member, in order


class Sentinel:
    """Unpickling this makes a file: a program that reads data must not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def make_files(samples: int, seed: int = 0, side: int = 8, first: int = 0) -> Files:
    """`<key>.jpg` and `<key>.txt` for each sample; no two contents are the same."""
    files = []
    for number in range(first, first + samples):
        file = io.BytesIO()
        pixels = np.random.default_rng((seed, number)).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        files += [(f"{number:05d}.jpg", file.getvalue()), (f"{number:05d}.txt", f"caption {seed}/{number}".encode())]
    return files


def to_tar(files: Files, format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive as Python's tarfile writes it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive.getvalue()


def find_members(tar: bytes) -> list[tarfile.TarInfo]:
    """The members of a sound archive; `offset` is that of the header, `offset_data` that of the content."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return archive.getmembers()


def flip(data: bytes, position: int, bit: int) -> bytes:
    """The bytes with one bit changed."""
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def header_flips(tar: bytes, number: int) -> Iterator[tuple[int, bytes]]:
    """Every bit of the header of member `number` in turn: position in bytes from the header's start, archive."""
    start = find_members(tar)[number].offset
    for position in range(BLOCK):
        for bit in range(8):
            yield position, flip(tar, start + position, bit)


def payload_flips(tar: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """One bit of the content of one member: its name, archive."""
    rng = random.Random(seed)
    members = [member for member in find_members(tar) if member.size]
    for _ in range(count):
        member = rng.choice(members)
        yield member.name, flip(tar, member.offset_data + rng.randrange(member.size), rng.randrange(8))


def cuts(tar: bytes, step: int = BLOCK) -> Iterator[bytes]:
    """The archive cut off at every multiple of `step` bytes."""
    for length in range(0, len(tar), step):
        yield tar[:length]


def seal(tar: bytes, start: int) -> bytes:
    """The archive with a right checksum in the header at `start`."""
    header = bytearray(tar[start : start + BLOCK])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:start] + bytes(header) + tar[start + BLOCK :]


def forgeries(tar: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Archives in which some bytes of one header are others, under a checksum that is right."""
    rng = random.Random(seed)
    starts = [at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    for _ in range(count):
        start, changed = rng.choice(starts), bytearray(tar)
        for _ in range(rng.randint(1, 3)):
            first, last = rng.choice([(0, 100), (100, 156), (124, 136), (156, 157), (257, 265), (329, 512)])
            changed[start + rng.randrange(first, last)] = rng.choice(b"\0 /.0157gxLKS\x80\xff" + rng.randbytes(1))
        yield seal(bytes(changed), start)


def cut_inside_text(files: Files) -> tuple[bytes, bytes]:
    """Two archives: the first ends inside the text of its last sample, the second starts with that sample's text."""
    first = to_tar(files)
    last = find_members(first)[-1]
    name, text = files[-1]
    assert name == last.name and name.endswith(".txt")
    return first[: last.offset_data + len(text) // 2], to_tar([(name, b"not the text of that image"), *files[:2]])


def hostile(files: Files, sentinel: Path) -> dict[str, Files]:
    """Sound members, at least four samples of two, changed in ways that are legal in a tar and bad in a data set."""
    image, text = files[2][1], files[3][1]
    key = files[2][0].partition(".")[0]
    before, after = files[:2], files[4:]
    return {
        "duplicate member": [*files[:4], files[2], *after],
        "duplicate key": [*files, *files[2:4]],
        "dotted keys": [
            *before,
            (f"{key}_1.0.jpg", image),
            (f"{key}_1.0.txt", text),
            (f"{key}_1.5.jpg", text),
            (f"{key}_1.5.txt", image),
            *after,
        ],
        "traversal": [*before, ("../../evil.jpg", image), ("../../evil.txt", text), *after],
        "absolute": [*before, ("/etc/evil.jpg", image), ("/etc/evil.txt", text), *after],
        "backslash": [*before, ("up\\evil.jpg", image), ("up\\evil.txt", text), *after],
        "control character": [*before, (f"{key}\n.jpg", image), (f"{key}\n.txt", text), *after],
        "missing member": [*files[:3], *after],
        "interleaved": [*before, files[2], files[4], files[3], files[5], *files[6:]],
        "case": [*files[:4], (f"{key}.TXT", text), *after],
        "reserved name": [*files[:4], (f"{key}.__bad__", text), *after],
        "pickle": [*files[:4], (f"{key}.pyd", pickle.dumps(Sentinel(sentinel))), *after],
        "name without key": [*files[:4], ("README", text), (".hidden", text), *after],
    }
