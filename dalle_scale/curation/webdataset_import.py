"""The samples of a webdataset tar that others wrote: what webdataset makes of the names, but only without doubt.

    size_bytes, sha256, samples, rows = scan(file)
    for sample in finalize(samples, require=("jpg", "txt")):
        ...  # to keep if `sample.reason` is empty; `to_rows` gives the ledger rows

webdataset cuts a name at the first dot of its last part: key, extension. Members of one key that stand side by side are
a sample. It merges `img_1.0.jpg` with `img_1.5.jpg`, gives a sample without the members that damage has taken, and
says nothing; here each of those is left out with a reason.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from dalle_scale.curation.tar import Member, Tar, TarError

_LONGEST_KEY_BYTES = 1024
_EXTENSION = re.compile(r"[a-z0-9_]{1,32}")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # key and extensions, as webdataset cuts them
_RESERVED = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps to itself

Row = dict[str, Any]  # of the ledger
Entry = tuple[int, int, int]  # offset, length, crc32


@dataclass
class Sample:
    """Members of one key that stand side by side."""

    key: str
    members: dict[str, Entry] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)  # what follows the key in names that make no member
    reason: str = ""  # why it is left out
    may_go_on: bool = False  # the tar was damaged before another key came

    def refuse(self, reason: str) -> None:
        """Leave it out; the first reason counts."""
        self.reason = self.reason or reason


class Hashed:
    """A stream that is read once; knows the digest and the number of the bytes that went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size_bytes = 0

    def read(self, count: int) -> bytes:
        """Up to `count` bytes."""
        data = self._file.read(count)
        self.sha256.update(data)
        self.size_bytes += len(data)
        return data

    def seekable(self) -> bool:
        """No."""
        return False


def scan(file: BinaryIO) -> tuple[int, str, list[Sample], list[Row]]:
    """Read a tar to the end of the file: its size in bytes, its sha256, its samples, ledger rows of what is none."""
    stream = Hashed(file)
    tar = Tar(stream)  # type: ignore[arg-type]
    samples: list[Sample] = []
    rows: list[Row] = []
    try:
        for member in tar:
            match = _NAME.fullmatch(member.name)
            if member.kind == "folder":
                continue
            if match is None or _RESERVED.match(member.name):
                rows.append({"key": None, "member": member.name, "reason": "a name without key and extension"})
                continue
            if not samples or samples[-1].key != match[1]:
                samples.append(Sample(match[1], reason=key_fault(match[1])))
            add(samples[-1], match[2].lower(), member, tar)
    except TarError as error:
        if samples:
            samples[-1].may_go_on = True
        rows.append({"key": None, "offset": error.offset, "reason": f"the tar is damaged: {error}"})
    while stream.read(1 << 20):
        pass
    return stream.size_bytes, stream.sha256.hexdigest(), samples, rows


def add(sample: Sample, extension: str, member: Member, tar: Tar) -> None:
    """Take in one member of a sample, after its content has been read to the end."""
    if member.kind != "file":
        sample.refuse(f"special member: '{extension}' is a {member.kind}")
    if extension in sample.members:
        sample.refuse(f"member comes twice: '{extension}'")
    if _RESERVED.fullmatch(extension):
        sample.refuse(f"reserved name: webdataset would take '{extension}' for its own")
    crc32 = 0
    try:
        for piece in tar.payload():
            crc32 = zlib.crc32(piece, crc32)
    except TarError:
        sample.refuse(f"cut off: '{extension}'")
        raise
    if _EXTENSION.fullmatch(extension):
        sample.members[extension] = (member.offset, member.size, crc32)
    else:
        sample.odd.append(extension)


def key_fault(key: str) -> str:
    """Return the reason why a key is invalid, or nothing. Folders, blanks and letters of any script are no harm."""
    if len(key.encode("utf-8", "surrogateescape")) > _LONGEST_KEY_BYTES:
        return f"key too long: more than {_LONGEST_KEY_BYTES} bytes"
    if not key.isprintable():  # control characters, and bytes that are not UTF-8
        return "characters that a key cannot have"
    if key.startswith("/") or re.match(r"[A-Za-z]:", key) or ".." in key.split("/") or "\\" in key:
        return "a name that leads out of its folder"
    return ""


def finalize(samples: list[Sample], require: tuple[str, ...]) -> list[Sample]:
    """Decide which samples are left out and why; needs all samples of a tar."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.key, []).append(sample)
    for group in groups.values():
        names = [name for sample in group for name in (*sample.members, *sample.odd)]
        again = "comes twice in this tar" if len(set(names)) < len(names) else "has members that are not side by side"
        for sample in group if len(group) > 1 else ():
            sample.refuse(f"the key {again}")
    for sample in samples:
        missing = [name for name in require if name not in sample.members]
        dotted = [name for name in sample.odd if "." in name]
        if sample.may_go_on and (missing or not require):
            sample.refuse("the tar is damaged before it is sure that this sample has all its members")
        if len(dotted) > 1:
            sample.refuse(f"names with several dots: {', '.join(map(repr, dotted))} may be of several samples")
        if missing:
            sample.refuse(f"no member: {', '.join(map(repr, missing))}")
        if not sample.members:
            sample.refuse(f"no member with a plain extension: {', '.join(map(repr, sample.odd))}")
    return samples


def to_rows(sample: Sample) -> list[Row]:
    """The ledger rows of a sample: one if it is left out, else one for each name that made no member."""
    if sample.reason:
        return [{"key": sample.key, "reason": sample.reason}]
    reason = "an extension that is not plain: left out of its sample"
    return [{"key": sample.key, "member": f"{sample.key}.{name}", "reason": reason} for name in sample.odd]
