"""The tar reader agrees with tarfile and GNU tar on sound archives and stops where others continue with damaged
ones."""

import gzip
import io
import os
import random
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import BLOCK, cuts, find_members, forgeries, header_flips, make_files, seal, to_tar

from dalle_scale.curation.tar import LONGEST_EXTRA_BYTES, Tar, TarError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


class Trickle(io.BytesIO):
    """A stream that cannot seek and gives fewer bytes than it is asked for."""

    def seekable(self) -> bool:
        return False

    def seek(self, *unused):
        raise io.UnsupportedOperation

    def read(self, count=-1):
        return super().read(random.Random(self.tell()).randint(1, max(1, count)))


def read(tar: bytes, stream=io.BytesIO) -> list[tuple]:
    return [tuple(member) for member in Tar(stream(tar))]


def read_contents(tar: bytes, stream=io.BytesIO) -> list[bytes]:
    reader = Tar(stream(tar))
    return [b"".join(reader.payload()) for _ in reader]


def read_until_damage(tar: bytes) -> tuple[list[tuple], TarError | None]:
    members = []
    try:
        for member in Tar(io.BytesIO(tar)):
            members.append(tuple(member))
    except TarError as error:
        return members, error
    return members, None


def read_with_tarfile(tar: bytes) -> list[tuple]:
    return [
        (member.name, member.offset_data, member.size, KINDS.get(member.type, "special"))
        for member in find_members(tar)
    ]


parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=60)
paths = st.lists(parts, min_size=1, max_size=6).map("/".join)
listings = st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(listings, st.sampled_from(FORMATS))
def test_archives_of_tarfile(files, format):
    try:
        tar = to_tar(files, format)
    except ValueError:  # a name that ustar cannot hold
        return
    assert read(tar) == read(tar, Trickle) == read_with_tarfile(tar)
    assert read_contents(tar) == read_contents(tar, Trickle) == [content for _, content in files]


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "oldgnu"])
def test_archives_of_gnu_tar(tmp_path, format):
    tree = tmp_path / "tree"
    long = "d" * 70 + "/" + "e" * 70 if format == "ustar" else "d" * 150 + "/" + "e" * 150
    (tree / long).parent.mkdir(parents=True)
    (tree / long).write_bytes(b"long name")
    (tree / "ключ.jpg").write_bytes(b"x" * 5000)
    (tree / "empty").touch()
    os.symlink("/etc/passwd", tree / "link")
    os.link(tree / "ключ.jpg", tree / "second name")
    os.mkfifo(tree / "fifo")
    subprocess.run(["tar", "cf", tmp_path / "x.tar", f"--format={format}", "-C", tree, "."], check=True)
    tar = (tmp_path / "x.tar").read_bytes()
    assert len(read(tar)) == 8
    assert read(tar) == read(tar, Trickle) == read_with_tarfile(tar)
    assert {member[3] for member in read(tar)} == {"file", "folder", "symbolic link", "hard link", "pipe"}


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.0"]])
def test_sparse_files_are_reported_and_passed_over(tmp_path, options):
    with (tmp_path / "sparse").open("wb") as file:
        for number in range(30):  # more pieces than a header has room for
            file.seek(number * 100_000)
            file.write(b"data" * 256)
    (tmp_path / "after").write_bytes(b"what comes after")
    command = ["tar", "cSf", tmp_path / "x.tar", *options, "-C", tmp_path, "sparse", "after"]
    subprocess.run(command, check=True)
    tar = (tmp_path / "x.tar").read_bytes()
    assert len(tar) < 200_000
    for stream in (io.BytesIO, Trickle):
        members = read(tar, stream)
        assert [(member[0], member[3]) for member in members] == [("sparse", "sparse file"), ("after", "file")]
        assert read_contents(tar, stream)[1] == b"what comes after"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_larger_than_a_header_can_say(tmp_path, format):
    size = 9 << 30
    info = tarfile.TarInfo("large")
    info.size = size
    header = info.tobuf(format)
    with (tmp_path / "x.tar").open("w+b") as file:
        file.write(header)
        file.seek(len(header) + size)  # a hole, which takes no room on disk
        file.write(to_tar([("small", b"small")]))
        file.seek(0)
        tar = Tar(file)
        assert [(member.name, member.size) for member in tar] == [("large", size), ("small", 5)]


@pytest.mark.parametrize("format", FORMATS)
def test_every_flipped_bit_of_a_header_is_found_or_changes_nothing(format):
    files = make_files(3)
    tar = to_tar(files, format)
    sound = read(tar)
    start = find_members(tar)[3].offset
    found = 0
    for position, damaged in header_flips(tar, 3):
        members, error = read_until_damage(damaged)
        if error is None:
            assert members == sound and 148 <= position < 156, "only the checksum can be written in several ways"
        else:
            assert error.offset == start and members == sound[:3]
            found += 1
    assert found > 4080
    # this is what it is for: tarfile ends there without a word
    assert len(read_with_tarfile(next(header_flips(tar, 3))[1])) == 3


@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_every_cut_is_found(stream):
    tar = to_tar(make_files(3))
    sound = read(tar)
    end = sound[-1][1] + -(-sound[-1][2] // BLOCK) * BLOCK + 2 * BLOCK
    for cut in [*cuts(tar), *cuts(tar, step=97)]:
        members = []
        try:
            for member in Tar(stream(cut)):
                members.append(tuple(member))
        except TarError as error:
            assert len(cut) < end and error.offset == len(cut) and "cut off" in error.reason
        else:
            assert len(cut) >= end, "after the mark there is only padding"
        assert members == sound[: len(members)]


@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_payload_says_when_it_is_cut_off(stream):
    tar = to_tar([("a", bytes(range(256)) * 20)])
    reader = Tar(stream(tar[: BLOCK + 1000]))
    next(iter(reader))
    pieces = []
    with pytest.raises(TarError, match="cut off: 4120 bytes") as caught:
        pieces.extend(reader.payload())
    assert caught.value.offset == BLOCK + 1000


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_accepted_is_what_tarfile_reads(format):
    """Headers that somebody made up, under a right checksum: read as tarfile does, or refused."""
    tar = to_tar([("x" * 120 + "/" + "y" * 90, b"long"), *make_files(2), ("folder/z.txt", b"z")], format)
    accepted = 0
    for forged in forgeries(tar, seed=format, count=4000):
        members, error = read_until_damage(forged)
        if error is None and not any(member[3] == "sparse file" for member in members):
            assert [(name.rstrip("/"), *rest) for name, *rest in members] == [
                (name.rstrip("/"), *rest) for name, *rest in read_with_tarfile(forged)
            ]
            accepted += 1
    assert 300 < accepted < 3900


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 10_000))
def test_noise_is_refused_and_nothing_else_happens(noise, at):
    tar = to_tar(make_files(2))
    at %= len(tar)
    for damaged in (noise, tar[:at] + noise, tar[:at] + noise + tar[at + len(noise) :]):
        members, error = read_until_damage(damaged)
        assert error is None or 0 <= error.offset <= len(damaged)
        assert all(offset + size <= len(damaged) for _, offset, size, _ in members[:-1])


def pax(records: dict[bytes, bytes], flag: bytes = b"x") -> bytes:
    """A pax header of its own."""
    body = b""
    for key, value in records.items():
        rest = b" " + key + b"=" + value + b"\n"
        length = next(length for length in range(len(rest), len(rest) + 9) if len(str(length)) + len(rest) == length)
        body += str(length).encode() + rest
    return extra(flag, body)


def extra(flag: bytes, body: bytes) -> bytes:
    info = tarfile.TarInfo("extra")
    info.size, info.type = len(body), flag
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % BLOCK)


def change(tar: bytes, changes: dict[int, bytes]) -> bytes:
    """The first header with other bytes, and a right checksum."""
    for at, data in changes.items():
        tar = tar[:at] + data + tar[at + len(data) :]
    return seal(tar, 0)


FILE = to_tar([("a.txt", b"text")], tarfile.USTAR_FORMAT)
END = bytes(2 * BLOCK)
BAD = {
    "nothing": (b"", "cut off"),
    "an empty block": (bytes(BLOCK), "cut off in the end-of-archive mark"),
    "a compressed tar": (gzip.compress(FILE), "compressed; only plain tars"),
    "a tar of before 1988": (change(FILE, {257: bytes(8)}), "not a tar header"),
    "two archives": (FILE + FILE, "something after the end"),
    "a block of zeros within": (FILE[: 2 * BLOCK] + bytes(BLOCK) + FILE, "something after the end"),
    "sizes that disagree": (pax({b"size": b"3"}) + FILE, "the header says 4 bytes, the pax header 3"),
    "a size for another reader": (pax({b"size": b"1024"}) + change(FILE, {124: b"0" * 11}), "0 bytes, the pax header"),
    "a size that is no number": (pax({b"size": b"-4"}) + FILE, "malformed"),
    "a size beyond everything": (change(FILE, {124: b"\x80" + b"\xff" * 11}), "a size that no file has"),
    "two names": (pax({b"path": b"b"}) + extra(b"L", b"c\0") + FILE, "two long names"),
    "two pax headers": (pax({b"path": b"b"}) * 2 + FILE, "two pax headers"),
    "two long names": (extra(b"L", b"c\0") * 2 + FILE, "two GNU long names"),
    "a long name without end": (extra(b"L", b"c") + FILE, "long name is malformed"),
    "a long name with two ends": (extra(b"L", b"c\0c\0") + FILE, "long name is malformed"),
    "a name that is empty": (pax({b"path": b""}) + FILE, "empty name"),
    "a header for nothing": (pax({b"path": b"b"}) + END, "between the headers"),
    "a global name": (pax({b"path": b"b"}, b"g") + FILE, "global pax header that sets path"),
    "a global size": (pax({b"size": b"4"}, b"g") + FILE, "global pax header that sets size"),
    "a comment in between": (pax({b"path": b"b"}) + pax({b"comment": b"c"}, b"g") + FILE, "between the headers"),
    "a link with content": (change(FILE, {156: b"2"}), "symbolic link with content"),
    "a folder with content": (change(FILE, {156: b"5"}), "folder with content"),
    "a pax header of Solaris": (extra(b"X", b"10 path=b\n") + FILE, "Solaris"),
    "a prefix in a GNU header": (change(FILE, {257: b"ustar  \0", 345: b"b"}), "incremental"),
    "a mode that is none": (change(FILE, {100: b"rwx"}), "malformed"),
    "a broken pax record": (extra(b"x", b"999 path=b\n") + FILE, "malformed"),
    "a pax record without end": (extra(b"x", b"9 path=bb") + FILE, "malformed"),
    "a large extra header": (extra(b"L", b"c" * (LONGEST_EXTRA_BYTES + 1)) + FILE, "more than"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [io.BytesIO, Trickle])
def test_what_is_damaged_or_ambiguous_is_refused(name, stream):
    tar, reason = BAD[name]
    with pytest.raises(TarError, match=reason) as caught:
        read(tar, stream)
    assert str(caught.value).startswith(f"byte {caught.value.offset}: ")


def test_comments_and_extra_headers_that_do_no_harm():
    tar = pax({b"comment": b"a commit"}, b"g") + pax({b"mtime": b"1.5", b"size": b"4"}) + extra(b"K", b"t\0") + FILE
    assert read(tar) == [("a.txt", len(tar) - len(FILE) + BLOCK, 4, "file")]
    long = b"n" * (LONGEST_EXTRA_BYTES - 1)
    assert read(extra(b"L", long + b"\0") + FILE)[0][0] == long.decode()
    assert read(change(FILE, {156: b"\0"}))[0][3] == "file"
    assert read(change(FILE, {156: b"V"}))[0][3] == "special"
    assert read(pax({b"path": b"caf\xe9"}) + FILE)[0][0] == "caf\udce9"
    assert read(END) == read(END + bytes(100)) == []


def test_an_archive_inside_a_file():
    file = io.BytesIO(b"before" + FILE)
    file.seek(6)
    assert next(iter(Tar(file))).offset == BLOCK, "offsets count from the start of the archive"
