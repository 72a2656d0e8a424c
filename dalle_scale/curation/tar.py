"""A strict tar reader: where each member of an uncompressed tar lies, and the byte at which an archive stops making
sense.

    tar = Tar(file)
    for member in tar:
        for piece in tar.payload():  # only if the content is wanted
            ...

Reads ustar, GNU and pax archives from any binary file, one that cannot seek included. Checks the magic and the checksum
of every header, and that the archive ends as one should. Python's `tarfile` ends at a damaged header as if the archive
ended there; here that is a `TarError`, and so is whatever different readers understand differently: after it no
offset can be trusted. Links are not followed and nothing is written: members that are no plain files are reported by
their kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LONGEST_EXTRA_BYTES = 1 << 20  # of a pax header or a GNU long name
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(BLOCK)
_POSIX, _GNU = b"ustar\x0000", b"ustar  \x00"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_NUMBER = re.compile(rb" *([0-7]*)[ \0]*")
_UNUSED_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))  # mode to device
_LARGEST = (1 << 63) - 1
_LARGEST_OCTAL = 8**11 - 1  # what the size field of a ustar header holds
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    b"S": "sparse file",
}
_WITHOUT_CONTENT = ("hard link", "symbolic link", "device", "folder", "pipe")
_EXTRAS = {b"L": "GNU long name", b"K": "GNU long link name", b"x": "pax header"}


class TarError(ValueError):
    """The archive is damaged, cut off or ambiguous at `offset` (bytes from its start); nothing after it is known."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return f"byte {self.offset}: {self.reason}"


class Member(NamedTuple):
    """One member. Its content is `size` bytes from `offset` on, counted from the start of the archive."""

    name: str  # bytes that are not UTF-8 are kept as surrogate escapes
    offset: int
    size: int
    kind: str  # "file", "folder", "symbolic link", "hard link", "sparse file", "device", "pipe" or "special"


class Tar:
    """The members of an archive that starts where `file` stands. May be iterated once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0  # bytes from the start of the archive
        self._left = 0  # of the content of the member that was given last
        self._padding = 0  # after it
        self._start = self._end = -1  # of the archive in a file that can seek
        if file.seekable():
            self._start = file.tell()
            self._end = file.seek(0, os.SEEK_END) - self._start
            file.seek(self._start)

    def __iter__(self) -> Iterator[Member]:
        """The members in order; what is not read of a payload is passed over.

        Raises:
            TarError: the header of the next member, or the end of the archive, is not as it should be.
        """
        extras: dict[str, bytes] = {}  # what the headers before a member's own say of it
        while True:
            self._pass_over()
            start = self._position
            header = self._read(BLOCK)
            if start == 0 and header.startswith(_COMPRESSED):
                raise TarError(start, "compressed; only plain tars can be read")
            if len(header) < BLOCK:
                raise TarError(start + len(header), "cut off: no end-of-archive mark")
            if header == _ZEROS:
                if extras:
                    raise TarError(start, "the archive ends between the headers of a member")
                return self._check_end()
            size = _check_header(header, start)
            flag = header[156:157]
            if flag in _EXTRAS:
                _add(extras, _EXTRAS[flag], self._extra(size, start), start)
            elif flag == b"g":
                if extras:
                    raise TarError(start, "a global pax header between the headers of a member")
                _check_global(_pax_records(self._extra(size, start), start), start)
            elif flag == b"X":
                raise TarError(start, "a Solaris pax header, which readers understand differently")
            else:
                yield self._member(header, size, extras, start)
                extras = {}

    def payload(self) -> Iterator[bytes]:
        """The content of the member that was given last, in pieces of at most 1 MiB.

        Raises:
            TarError: the archive ends before the content does.
        """
        while self._left:
            piece = self._read(min(self._left, _PIECE_BYTES))
            if not piece:
                raise TarError(self._position, f"cut off: {self._left} bytes of a member are missing")
            self._left -= len(piece)
            yield piece

    def _member(self, header: bytes, size: int, extras: dict[str, bytes], start: int) -> Member:
        """The member that a header and the extra headers before it describe."""
        pax = _pax_records(extras["pax header"], start) if "pax header" in extras else {}
        name = _name(header, extras, pax, start)
        flag = header[156:157]
        kind = _KINDS.get(flag, "special")
        if kind == "sparse file":
            self._pass_over_map(header)
        elif flag == b"\0" and name.endswith(b"/"):  # how folders were written before they had a flag
            kind = "folder"
        elif kind == "file" and any(key.startswith(b"GNU.sparse.") for key in pax):
            kind = "sparse file"
        size = _size(size, pax, start)
        if kind in _WITHOUT_CONTENT and size:
            raise TarError(start, f"a {kind} with content")
        if kind == "folder":
            name = name.rstrip(b"/")
        self._left, self._padding = size, -size % BLOCK
        return Member(name.decode("utf-8", "surrogateescape"), self._position, size, kind)

    def _extra(self, size: int, start: int) -> bytes:
        """The content of an extra header."""
        if size > LONGEST_EXTRA_BYTES:
            raise TarError(start, f"an extra header of {size} bytes, more than {LONGEST_EXTRA_BYTES}")
        self._left, self._padding = size, -size % BLOCK
        return b"".join(self.payload())

    def _pass_over_map(self, header: bytes) -> None:
        """Skip the blocks that an old GNU sparse file has between header and content."""
        more = header[482]
        while more:
            block = self._read(BLOCK)
            if len(block) < BLOCK:
                raise TarError(self._position, "cut off in the map of a sparse file")
            more = block[504]

    def _pass_over(self) -> None:
        """Go to the next header."""
        count = self._left + self._padding
        if self._end >= 0 and count:
            if self._position + count > self._end:
                raise TarError(
                    self._end, f"cut off: {self._position + count - self._end} bytes of a member are missing"
                )
            self._position += count
            self._file.seek(self._start + self._position)
        while self._end < 0 and count:
            piece = self._read(min(count, _PIECE_BYTES))
            if not piece:
                raise TarError(self._position, f"cut off: {count} bytes of a member are missing")
            count -= len(piece)
        self._left = self._padding = 0

    def _check_end(self) -> None:
        """After the first block of zeros: a second one, and nothing but zeros."""
        block = self._read(BLOCK)
        if len(block) < BLOCK:
            raise TarError(self._position, "cut off in the end-of-archive mark")
        while block:
            if block.count(0) != len(block):
                first = len(block) - len(block.lstrip(b"\0"))
                raise TarError(self._position - len(block) + first, "there is something after the end of the archive")
            block = self._read(_PIECE_BYTES)

    def _read(self, count: int) -> bytes:
        """So many bytes, fewer only at the end."""
        data = self._file.read(count)
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        self._position += len(data)
        return data


def _check_header(header: bytes, start: int) -> int:
    """Check what makes a block a header; the size that it states."""
    if header[257:265] not in (_POSIX, _GNU):
        raise TarError(start, "not a tar header")
    if _number(header[148:156], start) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarError(start, "the checksum of a header is wrong")
    for first, last in _UNUSED_NUMBERS:
        if header[first] not in (0x80, 0xFF) and not _NUMBER.fullmatch(header, first, last):
            raise TarError(start, "a number in a header is malformed")
    return _number(header[124:136], start)


def _number(field: bytes, start: int) -> int:
    """Octal digits, or a large number in binary."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        match = _NUMBER.fullmatch(field)
        if match is None:
            raise TarError(start, "a number in a header is malformed")
        value = int(match[1] or b"0", 8)
    if value > _LARGEST:
        raise TarError(start, "a size that no file has")
    return value


def _name(header: bytes, extras: dict[str, bytes], pax: dict[bytes, bytes], start: int) -> bytes:
    long_name = extras.get("GNU long name")
    path = pax.get(b"GNU.sparse.name", pax.get(b"path"))
    if long_name is not None and path is not None:
        raise TarError(start, "two long names for one member")
    if long_name is not None:
        if long_name.find(b"\0") != len(long_name) - 1:  # readers end it at the size, or at the first zero
            raise TarError(start, "a GNU long name is malformed")
        return long_name[:-1]
    if path is not None:
        if not path:
            raise TarError(start, "an empty name in a pax header")
        return path
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    if not prefix:
        return name
    if header[257:265] == _GNU:
        raise TarError(start, "an incremental GNU archive, which readers understand differently")
    return prefix + b"/" + name


def _size(size: int, pax: dict[bytes, bytes], start: int) -> int:
    """The size by header and pax header. Where both state one they must agree: who reads the other would find headers
    inside the content. A size too large for the header is 0 there."""
    stated = pax.get(b"size")
    if stated is None:
        return size
    if not stated.isdigit() or len(stated) > 19 or int(stated) > _LARGEST:
        raise TarError(start, "a size in a pax header is malformed")
    if int(stated) != size and (size or int(stated) <= _LARGEST_OCTAL):
        raise TarError(start, f"the header says {size} bytes, the pax header {int(stated)}")
    return int(stated)


def _pax_records(data: bytes, start: int) -> dict[bytes, bytes]:
    """`<length> <key>=<value>\\n`, again and again."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        repeated = key in records and not key.startswith(b"GNU.sparse.")
        if end > len(data) or not key or not equals or not value.endswith(b"\n") or repeated:
            raise TarError(start, "a pax header is malformed")
        records[key] = value[:-1]
        at = end
    return records


def _check_global(records: dict[bytes, bytes], start: int) -> None:
    """A global pax header may comment, but not say where members lie and what they are called."""
    for key in records:
        if key in (b"path", b"linkpath", b"size", b"hdrcharset") or key.startswith(b"GNU."):
            raise TarError(start, f"a global pax header that sets {key.decode('utf-8', 'replace')}")


def _add(extras: dict[str, bytes], kind: str, data: bytes, start: int) -> None:
    if kind in extras:
        raise TarError(start, f"two {kind}s for one member")
    extras[kind] = data
