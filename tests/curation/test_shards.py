"""Shards are plain tars with an exact index, the same bytes every time, and no damage passes unnoticed."""

import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dalle_scale.curation.shard_writer import Shard, ShardWriter, commit
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import Manifest, index_path
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError


def write(folder: Path, samples: int = 7, per_shard: int = 3, **options) -> dict[str, dict[str, bytes]]:
    """A data set with members of odd sizes, among them an empty one."""
    random = np.random.default_rng(0)
    content = {
        f"key-{index}": {
            "jpg" if index % 3 else "png": random.bytes(int(random.integers(0, 1500))),
            "txt": f"caption {index}".encode() * index,
        }
        for index in range(samples)
    }
    with ShardWriter(folder, per_shard, info={"kind": "test"}, **options) as writer:
        for key, members in content.items():
            writer.add(key, members)
    return content


def read_all(manifest: Manifest) -> tuple[dict[str, dict[str, bytes]], int]:
    """Every sample whose members all verify, and the number of the others."""
    reader, good, bad = Reader(manifest), {}, 0
    for sample in range(manifest.num_samples):
        try:
            names = [name for name in manifest.members if manifest.entry(sample, name)]
            good[manifest.key(sample)] = {name: reader.read(sample, name) for name in names}
        except BadSample:
            bad += 1
    reader.close()
    return good, bad


def test_reader_returns_what_was_written(tmp_path):
    content = write(tmp_path)
    manifest = Manifest.open(tmp_path)
    assert [shard.samples for shard in manifest.shards] == [3, 3, 1]
    assert manifest.info == {"kind": "test"}
    assert read_all(manifest) == (content, 0)
    with pytest.raises(BadSample, match="no member 'jpg'"):
        Reader(manifest).read(0, "jpg")


def test_tarfile_and_webdataset_read_the_same(tmp_path):
    content = write(tmp_path)
    paths = [str(tmp_path / shard.url) for shard in Manifest.open(tmp_path).shards]
    entries = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for entry in tar:
                entries[entry.name] = tar.extractfile(entry).read()
                assert (entry.mtime, entry.uid, entry.uname) == (0, 0, "")
    assert entries == {f"{key}.{name}": data for key, members in content.items() for name, data in members.items()}
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == list(content)
    assert all(sample["txt"] == content[sample["__key__"]]["txt"] for sample in samples)


def test_manifest_states_the_facts_of_the_files(tmp_path):
    content = write(tmp_path)
    manifest = Manifest.open(tmp_path)
    for shard in manifest.shards:
        data = (tmp_path / shard.url).read_bytes()
        assert (shard.size_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    entry = manifest.entry(5, "txt")
    assert entry.crc32 == zlib.crc32(content["key-5"]["txt"]) and entry.length == len(content["key-5"]["txt"])
    assert [manifest.samples(shard) for shard in range(3)] == [range(3), range(3, 6), range(6, 7)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index", "manifest.parquet", *(shard.url for shard in manifest.shards)]
    assert len(list((tmp_path / "index").iterdir())) == 3


def test_writing_again_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    write(tmp_path / "b", samples=5, per_shard=5, overwrite=True)
    assert [path.name for path in sorted((tmp_path / "b").glob("*.tar"))] == ["shard-000000.tar"]


def test_digest_changes_with_any_content(tmp_path):
    digests = set()
    for number, change in enumerate([{}, {"key": "other"}, {"text": b"x"}, {"info": {"kind": "b"}}]):
        with ShardWriter(tmp_path / str(number), info=change.get("info", {"kind": "a"})) as writer:
            writer.add(change.get("key", "key"), {"txt": change.get("text", b"y")})
        digests.add(Manifest.open(tmp_path / str(number)).digest)
    assert len(digests) == 4


def test_shards_of_several_processes_are_one_data_set(tmp_path):
    content = write(tmp_path / "one")
    keys = list(content)
    for number in (2, 0, 1):
        shard = Shard(tmp_path / "many", number)
        for key in keys[3 * number : 3 * number + 3]:
            shard.add(key, content[key])
        assert not index_path(tmp_path / "many", number).exists()
        shard.close()
        assert index_path(tmp_path / "many", number).exists()
    commit(tmp_path / "many", {"kind": "test"})
    assert Manifest.open(tmp_path / "many").digest == Manifest.open(tmp_path / "one").digest


@pytest.mark.parametrize("key", ["", "a.b", "../x", "/abs", "a b", "x" * 201, "ä"])
def test_malformed_keys_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="key"), ShardWriter(tmp_path) as writer:
        writer.add(key, {"txt": b""})
    assert not (tmp_path / "manifest.parquet").exists()


def test_duplicate_key_empty_set_and_occupied_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="'a' comes twice"), ShardWriter(tmp_path) as writer:
        writer.add("a", {"txt": b""})
        writer.add("a", {"txt": b""})
    assert not list(tmp_path.glob("*.tar")), "an interrupted writer leaves no shard that looks finished"
    with pytest.raises(UserError, match="no samples"), ShardWriter(tmp_path):
        pass
    write(tmp_path)
    with pytest.raises(UserError, match="already"):
        ShardWriter(tmp_path)


def test_missing_replaced_and_foreign_files_are_named_at_open(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(UserError, match=r"shard-000001\.tar.*10241 bytes"):
        Manifest.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar.*missing"):
        Manifest.open(tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a manifest"):
        Manifest.open(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Manifest.open(tmp_path / "nowhere")


def test_every_flipped_byte_is_found_or_harmless(tmp_path):
    content = write(tmp_path, samples=3)
    manifest = Manifest.open(tmp_path)
    path = tmp_path / manifest.shard(0).url
    sound = path.read_bytes()
    found = 0
    for position in range(0, len(sound), 13):  # headers, payloads and padding alike
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 0x10]) + sound[position + 1 :])
        good, bad = read_all(manifest)
        assert all(good[key] == content[key] for key in good)
        assert len(good) + bad == len(content)
        found += bad
    assert found > 50


def test_a_cut_shard_gives_no_half_sample(tmp_path):
    content = write(tmp_path, samples=3)
    manifest = Manifest.open(tmp_path)
    path = tmp_path / manifest.shard(0).url
    sound = path.read_bytes()
    for length in range(0, len(sound), 256):
        path.write_bytes(sound[:length])
        good, bad = read_all(manifest)
        assert all(good[key] == content[key] for key in good)
        assert len(good) + bad == len(content)


def test_a_vanished_shard_is_a_reason_not_a_crash(tmp_path):
    write(tmp_path)
    manifest = Manifest.open(tmp_path)
    (tmp_path / "shard-000000.tar").unlink()
    assert read_all(manifest)[1] == 3


def test_a_foreign_or_missing_index_is_named(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", samples=6)
    path = index_path(tmp_path / "a", 2)
    path.write_bytes(index_path(tmp_path / "b", 1).read_bytes())
    manifest = Manifest.open(tmp_path / "a")
    assert manifest.key(0) == "key-0", "only the index that is needed is read"
    with pytest.raises(UserError, match=r"000002\.parquet: not the index"):
        manifest.key(6)
    path.unlink()
    with pytest.raises(UserError, match=r"000002\.parquet: this shard's index is missing"):
        Manifest.open(tmp_path / "a").key(6)


def test_numbers_without_a_shard_are_passed_over(tmp_path):
    for number in (2, 5):
        shard = Shard(tmp_path, number)
        shard.add(f"key-{number}", {"txt": b"text"})
        shard.close()
    commit(tmp_path, {})
    manifest = Manifest.open(tmp_path)
    assert [manifest.key(sample) for sample in range(2)] == ["key-2", "key-5"]
    assert read_all(manifest)[1] == 0


def test_the_digest_does_not_depend_on_where_shards_lie(tmp_path):
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "elsewhere")
    assert Manifest.open(tmp_path / "a").digest == Manifest.open(tmp_path / "b" / "elsewhere").digest
