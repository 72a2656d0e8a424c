"""Damaged and hostile tars, read by the manifest of the sound one or indexed anew: right or accounted for."""

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import webdataset
from support.damage import (
    Sentinel,
    cut_inside_text,
    cuts,
    find_members,
    header_flips,
    hostile,
    make_files,
    payload_flips,
    to_tar,
)
from support.foreign import grouped, index, read_ledger, read_samples, write_tars

from dalle_scale.curation.webdataset_import import finalize, scan, to_rows
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError


class Watched:
    """A sound set of one tar that is opened once, then damaged in place again and again."""

    def __init__(self, folder: Path, files) -> None:
        self.path = write_tars(folder, {"x.tar": to_tar(files)}) / "x.tar"
        index(folder, "--out", folder)
        self.sound = self.path.read_bytes()
        self.manifest = Manifest.open(folder)
        self.content = grouped(files)
        assert self.manifest.num_samples == len(self.content)

    def read(self, damaged: bytes) -> int:
        """Read by the manifest of the sound tar; number of bad samples. Every byte that is delivered must be right."""
        self.path.write_bytes(damaged)
        reader, delivered, bad = Reader(self.manifest), 0, 0
        for sample in range(self.manifest.num_samples):
            expected = self.content[self.manifest.key(sample)]
            try:
                found = {name: reader.read(sample, name) for name in expected}
            except BadSample:
                bad += 1
            else:
                assert found == expected
                delivered += 1
        reader.close()
        assert delivered + bad == self.manifest.num_samples
        return bad

    def index(self, damaged: bytes) -> tuple[dict[str, str], int | None]:
        """Index the damaged tar: what became of each key, the byte of the damage. Whatever is kept must be right."""
        size_bytes, sha256, found, rows = scan(io.BytesIO(damaged))
        assert (size_bytes, sha256) == (len(damaged), hashlib.sha256(damaged).hexdigest())
        fates = {}
        for sample in finalize(found, ()):
            fates[sample.key] = sample.reason or "kept"
            assert sample.reason == "" or len(to_rows(sample)) == 1
            for offset, length, _ in sample.members.values() if not sample.reason else ():
                assert offset + length <= len(damaged)
        damages = [row["offset"] for row in rows if "offset" in row]
        assert len(damages) <= 1
        return fates, damages[0] if damages else None


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path, make_files(5))


def test_every_flipped_bit_of_a_header(watched):
    """Reading by the manifest does not notice, indexing stops there and says so."""
    second_text = 3
    start = find_members(watched.sound)[second_text].offset
    harmless = 0
    for number, (_, damaged) in enumerate(header_flips(watched.sound, second_text)):
        if number % 8 == 0:  # opening and reading the file costs more than indexing it
            assert watched.read(damaged) == 0
        fates, offset = watched.index(damaged)
        if offset is None:
            assert fates == dict.fromkeys(watched.content, "kept")
            harmless += 1
        else:
            assert offset == start and list(fates) == ["00000", "00001"]
            assert fates["00000"] == "kept" and "damaged before it is sure" in fates["00001"]
    assert harmless < 16


def test_every_cut(watched):
    for cut in cuts(watched.sound):
        bad = watched.read(cut)
        fates, offset = watched.index(cut)
        whole = [key for key, fate in fates.items() if fate == "kept"]
        ends = [member.offset_data + member.size for member in find_members(watched.sound)][1::2]
        assert bad == sum(end > len(cut) for end in ends)
        assert len(whole) <= 5 - bad, "no half sample is kept"
        assert len(whole) >= 4 - bad, "at most the one that may have gone on is lost besides"
        assert offset == len(cut) or (offset is None and len(whole) == 5)


def test_flipped_payloads(watched):
    for name, damaged in payload_flips(watched.sound, seed=0, count=100):
        assert watched.read(damaged) == 1
        assert watched.index(damaged) == (dict.fromkeys(watched.content, "kept"), None), name


def test_a_replaced_shard(watched, tmp_path):
    other = to_tar(make_files(5, seed=1))
    assert watched.read(other) == 5
    swapped = make_files(5)
    swapped[1], swapped[3] = (swapped[1][0], swapped[3][1]), (swapped[3][0], swapped[1][1])
    assert watched.read(to_tar(swapped)) == 2, "captions of the same length, swapped"


KEPT = {  # what is left of the four samples 00000 .. 00003, and the reason of the others
    "duplicate member": ("023", "member comes twice"),
    "duplicate key": ("023", "the key comes twice in this tar"),
    "dotted keys": ("023", "names with several dots"),
    "traversal": ("023", "a name that leads out of its folder"),
    "absolute": ("023", "a name that leads out of its folder"),
    "backslash": ("023", "a name that leads out of its folder"),
    "control character": ("023", "characters that a key cannot have"),
    "missing member": ("0123", None),
    "interleaved": ("03", "the key has members that are not side by side"),
    "case": ("023", "member comes twice"),
    "reserved name": ("023", "reserved name"),
    "pickle": ("0123", None),
    "name without key": ("0123", "a name without key and extension"),
}


@pytest.mark.parametrize("fault", KEPT)
def test_hostile_tars(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    files, sentinel = make_files(4), tmp_path / "sentinel"
    tar = to_tar(hostile(files, sentinel)[fault])
    watched = Watched(tmp_path / "sound", files)
    assert watched.read(tar) <= 4
    folder = write_tars(tmp_path / "hostile", {"x.tar": tar})
    index(folder, "--out", folder)
    kept, reason = KEPT[fault]
    found, rows = read_samples(folder), read_ledger(folder)
    assert [key[-1] for key in found] == list(kept)
    for key, members in found.items():
        extra = members.keys() - {"jpg", "txt"}
        assert {name: members[name] for name in members.keys() - extra}.items() <= grouped(files)[key].items()
        assert extra == ({"pyd"} if fault == "pickle" and key == "00001" else set())
    assert bool(rows) == (reason is not None) and all(row["reason"].startswith(reason) for row in rows)
    named = {row["key"] for row in rows} | {row.get("member") for row in rows} | set(found)
    for name, _ in hostile(files, sentinel)[fault]:
        assert name in named or any(key and name.startswith(f"{key}.") for key in named), "accounted for"
    assert not sentinel.exists() and not (tmp_path / "evil.jpg").exists()


def test_the_pickle_would_have_run(tmp_path):
    """The sentinel of the test before is a real one."""
    files = hostile(make_files(4), tmp_path / "sentinel")["pickle"]
    pickle.loads(dict(files)["00001.pyd"])
    assert (tmp_path / "sentinel").exists() and Sentinel(tmp_path).__reduce__()[0] is Path.touch


def test_members_that_are_required(tmp_path):
    files = make_files(4)
    folder = write_tars(tmp_path, {"x.tar": to_tar(hostile(files, tmp_path)["missing member"])})
    index(folder, "--out", folder, "--require", "jpg,txt")
    assert list(read_samples(folder)) == ["00000", "00002", "00003"]
    assert [(row["key"], row["reason"]) for row in read_ledger(folder)] == [("00001", "no member: 'txt'")]
    # a declared sample is known to be whole when a header after it is damaged
    tar = to_tar(files)
    start = find_members(tar)[4].offset
    folder = write_tars(tmp_path / "cut", {"x.tar": tar[: start + 100]})
    index(folder, "--out", folder, "--require", "jpg,txt")
    assert list(read_samples(folder)) == ["00000", "00001"]
    (row,) = read_ledger(folder)
    assert row["offset"] == start + 100 and row["reason"].startswith("the tar is damaged: byte ")


def test_an_extension_that_is_not_plain_leaves_the_rest(tmp_path):
    files = [*make_files(2), ("00001.seg.png", b"x"), ("00002.my-ext", b"x")]
    folder = write_tars(tmp_path, {"x.tar": to_tar(files)})
    index(folder, "--out", folder)
    assert read_samples(folder) == grouped(make_files(2))
    assert [(row["key"], row.get("member")) for row in read_ledger(folder)] == [
        ("00001", "00001.seg.png"),
        ("00002", None),
    ]


def test_a_caption_never_goes_to_the_image_of_another_shard(tmp_path):
    files = make_files(3)
    first, second = cut_inside_text(files)
    folder = write_tars(tmp_path, {"a.tar": first, "b.tar": second})
    index(folder, "--out", folder)
    found = read_samples(folder)
    assert found["00002"] == {"txt": b"not the text of that image"}, "its image is in the damaged tar, without text"
    assert found["00000"] == grouped(files)["00000"] and set(found) == {"00000", "00001", "00002"}
    reasons = {(row["shard"], row["key"]): row["reason"] for row in read_ledger(folder)}
    assert reasons["a.tar", "00002"] == "cut off: 'txt'"
    assert reasons["b.tar", "00000"] == "another tar has this key: a.tar"
    # this is what it is for: a reader that goes by adjacent names pairs them
    paths = [str(folder / name) for name in ("a.tar", "b.tar")]
    theirs = webdataset.WebDataset(paths, shardshuffle=False, handler=lambda error: True)
    pairs = {sample["__key__"]: sample.get("txt") for sample in theirs if "jpg" in sample}
    assert pairs["00002"] == b"not the text of that image"


def test_keys_of_several_tars(tmp_path):
    folder = write_tars(
        tmp_path, {name: to_tar(make_files(3, seed=seed)) for seed, name in enumerate(("a.tar", "b.tar"))}
    )
    index(folder, "--out", tmp_path / "plain")
    assert read_samples(tmp_path / "plain") == grouped(make_files(3))
    assert len(read_ledger(tmp_path / "plain")) == 3 and Manifest.open(tmp_path / "plain").num_shards == 1
    index(folder, "--out", tmp_path / "prefixed", "--prefix-keys")
    expected = {
        f"{name}/{key}": value for seed, name in enumerate("ab") for key, value in grouped(make_files(3, seed)).items()
    }
    assert read_samples(tmp_path / "prefixed") == expected and read_ledger(tmp_path / "prefixed") == []


def test_tars_that_hold_nothing(tmp_path):
    folder = write_tars(tmp_path, {"a.tar": to_tar([]), "b.tar": b"no tar at all" * 99, "c.tar": to_tar(make_files(1))})
    index(folder, "--out", folder)
    assert [shard.url for shard in Manifest.open(folder).shards] == ["c.tar"]
    assert [(row["shard"], row["reason"]) for row in read_ledger(folder)] == [
        ("a.tar", "no samples in this tar"),
        ("b.tar", "the tar is damaged: byte 0: not a tar header"),
    ]
    index(folder, "--out", folder)  # complete already
    with pytest.raises(UserError, match="no samples"):
        index(folder / "a.tar", "--out", tmp_path / "empty")
