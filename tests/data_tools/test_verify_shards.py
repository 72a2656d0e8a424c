"""verify_shards.py finds every fault that was made, names its place, and nothing else; a sound set is sound."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.damage import find_members, flip, hostile, make_files, seal, to_tar
from support.foreign import grouped, index, load_program, read_files, write_tars
from support.processes import HANG_SECONDS, ROOT, environment
from support.shelf import Shelf

from dalle_scale.curation.shard_writer import Shard, ShardWriter, commit
from dalle_scale.data import codes
from dalle_scale.data.manifest import Manifest
from dalle_scale.types import UserError

PROGRAM = ROOT / "data_tools" / "verify_shards.py"
verify_shards = load_program("verify_shards")
Change = Callable[[Path], None]
INFO = {"kind": "codes", "grids": [3], "vocab": 64}


def verify(folder: Path) -> tuple[int, dict, list[tuple]]:
    """Exit code, report, and (fault, shard, key) of every row."""
    try:
        verify_shards.main(["--data", str(folder), "--workers", "1"])
        code = 0
    except SystemExit as end:
        code = end.code
    report = json.loads((folder / "verify.json").read_text())
    rows = [json.loads(line) for line in (folder / "verify.jsonl").read_text().splitlines()]
    assert all(set(row) == {"fault", "shard", "key", "reason"} and "\n" not in row["reason"] for row in rows)
    assert sum(report["faults"].values()) == len(rows) and report["sound"] == (not rows) == (code == 0)
    return code, report, [(row["fault"], row["shard"], row["key"]) for row in rows]


def members(number: int) -> dict[str, bytes]:
    """The members of a sound sample."""
    (_, image_file), (_, text) = make_files(1, first=number)
    values = np.random.default_rng(number).integers(0, 64, 9)
    return {"jpg": image_file, "txt": text, "codes": codes.pack(values)}


def write_set(folder: Path, change: Callable[[dict[str, dict[str, bytes]]], None] = lambda content: None) -> Path:
    """Eight samples in two shards, after a change."""
    content = {f"key-{number}": members(number) for number in range(8)}
    change(content)
    with ShardWriter(folder, samples_per_shard=4, info=INFO) as writer:
        for key, value in content.items():
            writer.add(key, value)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sound") / "set")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "set")


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def first_shard(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: edit(folder / "shard-000000.tar", change)


def flip_content(name: str) -> Callable[[bytes], bytes]:
    def change(tar: bytes) -> bytes:
        member = next(member for member in find_members(tar) if member.name == name)
        return flip(tar, member.offset_data + member.size // 2, 4)

    return change


def rename(old: str, new: str) -> Callable[[bytes], bytes]:
    """Another name in a header, under a right checksum."""

    def change(tar: bytes) -> bytes:
        start = next(member for member in find_members(tar) if member.name == old).offset
        return seal(tar[:start] + new.encode() + tar[start + len(new) :], start)

    return change


def resize(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> Callable[[bytes], bytes]:
    """Another size and kind in a header, under a right checksum."""

    def change(tar: bytes) -> bytes:
        start = next(member for member in find_members(tar) if member.name == name).offset
        return seal(
            tar[: start + 124] + b"%011o\0" % size + tar[start + 136 : start + 156] + kind + tar[start + 157 :], start
        )

    return change


def append(tar: bytes) -> bytes:
    """One member more, in the room of the padding at the end."""
    more = to_tar([("more.txt", b"more")], tarfile.USTAR_FORMAT)[:1024]
    end = len(tar.rstrip(b"\0")) // 512 * 512 + 512
    return (tar[:end] + more + bytes(len(tar)))[: len(tar)]


def swap_shards(folder: Path) -> None:
    paths = [folder / f"shard-00000{number}.tar" for number in (0, 1)]
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)


ALL = [f"key-{number}" for number in range(4)]
SHARD, OTHER = "shard-000000.tar", "shard-000001.tar"
FILE_FAULTS: dict[str, tuple[Change, set[tuple]]] = {
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), {("shard missing", SHARD, None)}),
    "a flipped bit of an image": (
        first_shard(flip_content("key-1.jpg")),
        {("shard digest", SHARD, None), ("member checksum", SHARD, "key-1")},
    ),
    "a flipped bit of a header": (
        first_shard(lambda tar: flip(tar, find_members(tar)[4].offset, 0)),
        {("shard digest", SHARD, None), ("tar damaged", SHARD, None)},
    ),
    "a flipped bit of the padding": (first_shard(lambda tar: flip(tar, 700, 0)), {("shard digest", SHARD, None)}),
    "another name in a header": (
        first_shard(rename("key-2.txt", "key-9.txt")),
        {("shard digest", SHARD, None), ("header disagrees", SHARD, "key-2")},
    ),
    "another size in a header": (
        first_shard(resize("key-2.txt", 3)),
        {("shard digest", SHARD, None), ("header disagrees", SHARD, "key-2")},
    ),
    "a link in place of a member": (
        first_shard(resize("key-2.txt", 0, tarfile.SYMTYPE)),
        {("shard digest", SHARD, None), ("tar damaged", SHARD, None), ("header disagrees", SHARD, "key-2")},
    ),
    "a member too many": (
        first_shard(append),
        {("shard digest", SHARD, None), ("header disagrees", SHARD, None)},
    ),
    "a shard that continues": (
        first_shard(lambda tar: tar + b"x"),
        {("shard size", SHARD, None), ("tar damaged", SHARD, None)},
    ),
    "an empty shard": (
        first_shard(lambda tar: b""),
        {("shard size", SHARD, None), ("tar damaged", SHARD, None), *(("member cut off", SHARD, key) for key in ALL)},
    ),
    "a folder in place of a shard": (
        lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).mkdir()),
        {("shard missing", SHARD, None)},
    ),
    "a shard too many": (
        lambda folder: shutil.copy(folder / SHARD, folder / "x.tar"),
        {("extra file", "", None)},
    ),
    "a leftover": (lambda folder: (folder / ".x.tar.tmp").touch(), {("extra file", "", None)}),
    "an index too many": (lambda folder: (folder / "index" / "000002.parquet").touch(), {("extra file", "", None)}),
    "a missing index": (
        lambda folder: (folder / "index" / "000001.parquet").unlink(),
        {("index damaged", OTHER, None)},
    ),
    "a damaged index": (
        lambda folder: edit(folder / "index" / "000001.parquet", lambda data: flip(data, 300, 0)),
        {("index damaged", OTHER, None)},
    ),
    "an index of another shard": (
        lambda folder: shutil.copy(folder / "index" / "000000.parquet", folder / "index" / "000001.parquet"),
        {("index damaged", OTHER, None), *(("key comes twice", OTHER, key) for key in ALL)},
    ),
    "a damaged manifest": (
        lambda folder: edit(folder / "manifest.parquet", lambda data: data[:99]),
        {("manifest damaged", "manifest.parquet", None)},
    ),
}


def test_a_sound_set(folder):
    code, report, rows = verify(folder)
    assert (code, rows) == (0, []) and report["sound"] and report["faults"] == {}
    assert (report["shards"], report["samples"]) == (2, 8)
    assert report["digest"] == Manifest.open(folder).digest
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert report["seconds"] > 0 and report["samples_per_second"] > 0
    assert verify(folder)[0] == 0, "its own reports are no fault"


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_faults_of_files(folder, name):
    change, expected = FILE_FAULTS[name]
    change(folder)
    code, _, rows = verify(folder)
    assert {(fault, "" if shard == str(folder) else shard, key) for fault, shard, key in rows} == expected
    assert code == 3


def test_swapped_shards_and_several_faults_at_once(folder):
    swap_shards(folder)
    (folder / "index" / "000001.parquet").unlink()
    _, report, _ = verify(folder)
    assert report["faults"].keys() >= {"shard digest", "header disagrees", "member checksum", "index damaged"}
    (folder / SHARD).unlink()
    assert verify(folder)[1]["faults"] == {"shard missing": 1, "shard digest": 1, "index damaged": 1}


def test_every_cut(folder):
    tar = (folder / SHARD).read_bytes()
    ends = [member.offset_data + member.size for member in find_members(tar)]
    for length in range(0, len(tar), 512):
        (folder / SHARD).write_bytes(tar[:length])
        _, report, rows = verify(folder)
        cut = sum(end > length for end in ends)
        assert report["faults"].get("member cut off", 0) == cut and ("shard size", SHARD, None) in rows
        assert {row for row in rows if row[1] != SHARD} == set()


def change_member(key: str, name: str, content: bytes | None) -> Callable[[dict], None]:
    def change(samples: dict[str, dict[str, bytes]]) -> None:
        if content is None:
            del samples[key][name]
        else:
            samples[key][name] = content

    return change


@pytest.mark.parametrize(
    ("name", "content", "fault", "reason"),
    [
        ("jpg", make_files(1)[0][1][:300], "image", "cannot decode"),
        ("jpg", b"no image", "image", "cannot decode"),
        ("txt", b"caf\xe9", "caption not UTF-8", "not UTF-8"),
        ("txt", b" \n", "caption empty", "empty"),
        ("codes", codes.pack(np.arange(8)), "codes", "8 codes instead of 9"),
        ("codes", codes.pack(np.arange(9) + 60), "codes", "code 68 is not below 64"),
        ("jpg", None, "member missing", "no image"),
        ("txt", None, "member missing", "no 'txt'"),
        ("codes", None, "member missing", "no 'codes'"),
    ],
)
def test_faults_of_samples(tmp_path, name, content, fault, reason):
    folder = write_set(tmp_path / "set", change_member("key-5", name, content))
    code, _, rows = verify(folder)
    assert (code, rows) == (3, [(fault, OTHER, "key-5")])
    assert reason in (folder / "verify.jsonl").read_text()


def test_keys_that_come_twice(tmp_path):
    for number in range(3):  # as ranks write them, each without the others' keys
        shard = Shard(tmp_path, number)
        for key in ("same" if number != 1 else "other", f"key-{number}"):
            shard.add(key, members(number))
        shard.close()
    commit(tmp_path, INFO)
    assert verify(tmp_path)[2] == [("key comes twice", "shard-000002.tar", "same")]


def test_codes_without_a_vocabulary_in_the_manifest(tmp_path):
    with ShardWriter(tmp_path, info={"kind": "codes"}) as writer:
        writer.add("a", {"codes": b"\0\0"})
    assert verify(tmp_path)[2] == [("codes", SHARD, "a")]


def test_a_manifest_that_lies(folder, tmp_path):
    """Shards elsewhere, addresses that are commands: faults, and nothing runs."""
    table = pq.read_table(folder / "manifest.parquet")
    urls = [f"pipe:touch {tmp_path}/sentinel", "file:///etc/passwd"]
    changed = table.set_column(0, "url", [urls]).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, folder / "manifest.parquet")
    _, report, rows = verify(folder)
    assert rows[2:] == [("shard missing", urls[0], None), ("shard cannot be fetched", urls[1], None)]
    assert report["faults"]["extra file"] == 2 and not (tmp_path / "sentinel").exists()


def test_sets_of_foreign_tars(tmp_path):
    """What was left out when they were indexed is no fault, what happened since is one."""
    files = make_files(4)
    tars = {"a.tar": to_tar(hostile(files, tmp_path)["dotted keys"]), "b.tar": to_tar(make_files(4, first=9))[:5000]}
    tars |= {"c.tar": b"no tar", "d.tar": to_tar([(name.upper(), data) for name, data in make_files(2, first=50)])}
    folder = write_tars(tmp_path / "set", tars)
    index(folder, "--out", folder)
    assert verify(folder)[0] == 0
    index(folder, "--out", tmp_path / "prefixed", "--prefix-keys")
    assert verify(tmp_path / "prefixed")[0] == 0
    edit(folder / "b.tar", lambda tar: tar[:4500])
    assert {row[0] for row in verify(folder)[2]} >= {"shard size", "tar damaged"}
    (folder / "new.tar").write_bytes(to_tar(make_files(1)))
    assert ("extra file", str(folder), None) in verify(folder)[2]


def test_remote_shards(tmp_path):
    with Shelf() as shelf:
        shelf.files = {f"{number}.tar": to_tar(make_files(3, first=3 * number)) for number in range(2)}
        index(shelf.url("{0..1}.tar"), "--out", tmp_path)
        assert verify(tmp_path)[0] == 0
        shelf.faults["1.tar"] = ["404"]
        assert verify(tmp_path)[2] == [("shard cannot be fetched", shelf.url("1.tar"), None)]
    assert len(grouped(make_files(6))) == Manifest.open(tmp_path).num_samples


def test_the_program_with_several_processes(folder, tmp_path):
    swap_shards(folder)
    rows = verify(folder)[2]
    before = read_files(folder)["verify.jsonl"]
    command = [sys.executable, str(PROGRAM), "--data", str(folder), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert result.returncode == 3 and "faults, see" in result.stdout, result.stderr
    assert read_files(folder)["verify.jsonl"] == before and len(rows) > 10
    with pytest.raises(UserError, match="no data set"):
        verify_shards.main(["--data", str(tmp_path)])
    with pytest.raises(UserError, match="at least 1"):
        verify_shards.main(["--data", str(folder), "--workers", "0"])
