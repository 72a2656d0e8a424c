"""index_shards.py: sound tars read as with webdataset, wherever they lie; the same bytes whatever happens meanwhile."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from support.damage import BLOCK, hostile, make_files, to_tar
from support.foreign import grouped, index, index_shards, read_files, read_ledger, read_samples, write_tars
from support.processes import HANG_SECONDS, ROOT, environment
from support.shelf import Shelf

from dalle_scale.data.manifest import Manifest
from dalle_scale.types import UserError

PROGRAM = ROOT / "data_tools" / "index_shards.py"


def wait_for_group(group: int) -> None:
    """Wait until none of a group of processes is left; those of a killed program must go by themselves."""
    until = time.monotonic() + HANG_SECONDS
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("processes were left running")


def three_tars(folder: Path) -> Path:
    return write_tars(folder, {f"set-{number}.tar": to_tar(make_files(4, first=4 * number)) for number in range(3)})


# --- sound tars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_reads_the_same(tmp_path, format):
    long = "a.b/" + "c" * 90 + "/" + "d" * 90
    names = ["./000", "cats and dogs/1", "katze/ä", long] if format != tarfile.USTAR_FORMAT else ["./000", "x/1"]
    files = [
        (f"{name}.{extension}", f"{name} {extension}".encode() * (200_000 if extension == "json" else 99))
        for name in names
        for extension in ("JPG", "json", "txt", "cls")
    ]
    folder = write_tars(tmp_path, {"a.tar": to_tar(files, format), "b.tar": to_tar(make_files(5), format)})
    index(folder, "--out", folder)
    paths = [str(folder / name) for name in ("a.tar", "b.tar")]
    theirs = {
        sample["__key__"]: {name: value for name, value in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(paths, shardshuffle=False)
    }
    assert read_samples(folder) == theirs and len(theirs) == len(names) + 5
    assert list(read_samples(folder)) == list(theirs) and read_ledger(folder) == []
    for shard in Manifest.open(folder).shards:
        tar = (folder / shard.url).read_bytes()
        assert (shard.size_bytes, shard.sha256) == (len(tar), hashlib.sha256(tar).hexdigest())


def test_archives_of_gnu_tar_with_folders_and_links(tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name, data in make_files(4):
        (tree / "sub" / name).write_bytes(data)
    os.symlink("/etc/passwd", tree / "sub" / "00001.cls")
    command = ["tar", "cf", tmp_path / "x.tar", "--sort=name", "-C", tree, "."]
    subprocess.run(command, check=True)
    index(tmp_path / "x.tar", "--out", tmp_path / "out")
    expected = {f"./sub/{key}": members for key, members in grouped(make_files(4)).items() if key != "00001"}
    assert read_samples(tmp_path / "out") == expected
    reason = "special member: 'cls' is a symbolic link"
    assert read_ledger(tmp_path / "out") == [{"shard": str(tmp_path / "x.tar"), "key": "./sub/00001", "reason": reason}]


def test_where_the_tars_lie(tmp_path):
    folder = three_tars(tmp_path / "set")
    before = read_files(folder)
    index(folder, "--out", folder)
    assert [shard.url for shard in Manifest.open(folder).shards] == ["set-0.tar", "set-1.tar", "set-2.tar"]
    assert {name: read_files(folder)[name] for name in before} == before, "the tars are not touched"
    (tmp_path / "set" / "list.txt").write_text(f"set-2.tar\n\n{folder}/set-{{0..1}}.tar\n")
    index(folder / "list.txt", "--out", tmp_path / "other")
    urls = [shard.url for shard in Manifest.open(tmp_path / "other").shards]
    assert urls == [str(folder / f"set-{number}.tar") for number in (2, 0, 1)]
    assert read_samples(tmp_path / "other") == read_samples(folder) == grouped(make_files(12))
    index(folder / "set-[01].tar", "--out", tmp_path / "two")
    assert len(Manifest.open(tmp_path / "two").shards) == 2


def test_tars_on_a_server_and_what_it_does_wrong(tmp_path):
    folder = three_tars(tmp_path / "set")
    index(folder, "--out", folder)
    local = Manifest.open(folder)
    with Shelf() as shelf:
        shelf.files = {f"set-{number}.tar": (folder / f"set-{number}.tar").read_bytes() for number in range(3)}
        index(shelf.url("set-{0..2}.tar"), "--out", tmp_path / "remote")
        remote = Manifest.open(tmp_path / "remote")
        assert [shard.url for shard in remote.shards] == [shelf.url(f"set-{number}.tar") for number in range(3)]
        assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]
        assert [remote.entry(sample, "txt") for sample in range(12)] == [local.entry(s, "txt") for s in range(12)]
        assert max(shelf.counts.values()) == 1, "each is read once"
        shelf.faults = {"set-1.tar": ["short"], "set-2.tar": ["404", "404"]}
        with pytest.raises(UserError, match=r"1 of 3 tars cannot be read.*set-2\.tar"):
            index(shelf.url("set-{0..2}.tar"), "--out", tmp_path / "again")
        assert shelf.counts["set-1.tar"] == 3 and not (tmp_path / "again" / "manifest.parquet").exists()
        index(shelf.url("set-{0..2}.tar"), "--out", tmp_path / "again", "--skip-unreadable")
        assert Manifest.open(tmp_path / "again").num_samples == 8
        (row,) = read_ledger(tmp_path / "again")
        assert row["shard"] == shelf.url("set-2.tar") and row["reason"].startswith("cannot be read: ")
        shelf.files["set-2.tar"] = shelf.files["set-2.tar"][: -BLOCK * 4]
        index(shelf.url("set-{0..2}.tar"), "--out", tmp_path / "again", "--overwrite")
        assert Manifest.open(tmp_path / "again").num_samples == 12


# --- again and again --------------------------------------------------------------------------------------------------


def hard_set(folder: Path) -> Path:
    """Six tars with something of everything."""
    faults = hostile(make_files(4), folder / "sentinel")
    tars = {f"{number}.tar": to_tar(make_files(4, first=4 * number)) for number in (1, 2, 3)}
    tars |= {"0.tar": to_tar(faults["interleaved"]), "4.tar": to_tar(faults["dotted keys"])}
    return write_tars(folder, {**tars, "5.tar": to_tar(make_files(9, first=8))[:9000]})


def test_any_number_of_processes_writes_the_same(tmp_path):
    folder = hard_set(tmp_path / "set")
    index(folder, "--out", tmp_path / "one")
    command = [sys.executable, str(PROGRAM), str(folder), "--out", str(tmp_path / "three"), "--workers", "3"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    assert read_files(tmp_path / "three") == read_files(tmp_path / "one") and len(read_ledger(tmp_path / "one")) > 5


def test_a_killed_run_goes_on_and_writes_the_same(tmp_path):
    folder = hard_set(tmp_path / "set")
    with Shelf() as shelf:
        shelf.files["6.tar"] = to_tar(make_files(40, first=40))
        sources = [str(folder), shelf.url("6.tar")]
        index(*sources, "--out", tmp_path / "whole")
        shelf.faults["6.tar"] = ["hang"]
        command = [sys.executable, str(PROGRAM), *sources, "--out", str(tmp_path / "killed"), "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True)
        assert shelf.is_hanging.wait(HANG_SECONDS)
        with pytest.raises(UserError, match="another run is at work"):
            index(*sources, "--out", tmp_path / "killed")
        process.kill()
        process.wait()
        wait_for_group(process.pid)
        assert not (tmp_path / "killed" / "manifest.parquet").exists()
        parts = tmp_path / "killed" / index_shards.PARTS
        assert len(list(parts.glob("*.json"))) == 6
        times = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
        jobs = [
            index_shards.Job(
                number, source, index_shards.to_url(source, parts.parent), parts.parent, index_shards.Options()
            )
            for number, source in enumerate(index_shards.expand(sources, Path()))
        ]
        index_shards.read_tars(jobs[:6], workers=1, skip_unreadable=False)
        assert times == {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}, "not read again"
        index(*sources, "--out", tmp_path / "killed")
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")
    assert set(Counter(row["shard"] for row in read_ledger(tmp_path / "killed"))) >= {
        f"{folder}/0.tar",
        f"{folder}/5.tar",
    }


def test_a_tar_that_has_changed_since_is_read_again(tmp_path):
    folder, out = three_tars(tmp_path / "set"), tmp_path / "out"
    sources = list(index_shards.expand([str(folder)], Path()))
    jobs = [
        index_shards.Job(number, source, source, out, index_shards.Options()) for number, source in enumerate(sources)
    ]
    index_shards.prepare(out, jobs, overwrite=False)
    index_shards.read_tars(jobs, workers=1, skip_unreadable=False)
    (folder / "set-1.tar").write_bytes(to_tar(make_files(40, first=100)))
    index(folder, "--out", out)
    assert read_samples(out) == grouped([*make_files(4), *make_files(40, first=100), *make_files(4, first=8)])
    assert not (out / index_shards.PARTS).exists()


def test_an_occupied_folder(tmp_path, capsys):
    folder = three_tars(tmp_path / "set")
    index(folder, "--out", folder)
    before = read_files(folder)
    index(folder, "--out", folder)
    assert "complete already" in capsys.readouterr().out and read_files(folder) == before
    with pytest.raises(UserError, match="holds another data set"):
        index(folder, "--out", folder, "--prefix-keys")
    with pytest.raises(UserError, match="holds another data set"):
        index(folder / "set-0.tar", "--out", folder)
    index(folder / "set-0.tar", "--out", folder, "--overwrite")
    assert Manifest.open(folder).num_samples == 4 and len(list(folder.glob("*.tar"))) == 3
    shutil.rmtree(folder / "index")
    (folder / "manifest.parquet").unlink()
    (folder / "index").mkdir()
    with pytest.raises(UserError, match="unfinished data set of another program"):
        index(folder, "--out", folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:touch sentinel", "no program is run"),
        ("pipe://touch sentinel", "no program is run"),
        ("file:///etc/passwd", "give a file, or an address"),
        ("nowhere.tar", "no such file"),
        ("none-*.tar", "no such file"),
        ("empty", "no tar there"),
        ("x-{5..3}.tar", "a range goes up"),
        ("x-{0..99999999999}.tar", "a range goes up"),
        ("lists.txt", "a list in a list"),
        ("noise.txt", "not a list of tars"),
        ("pipes.txt", "no program is run"),
    ],
)
def test_wrong_sources_get_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "lists.txt").write_text("lists.txt\n")
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "pipes.txt").write_text("pipe:touch sentinel\n")
    with pytest.raises(UserError, match=message):
        index(source, "--out", tmp_path / "out")
    assert not (tmp_path / "sentinel").exists() and not (tmp_path / "out").exists()


def test_wrong_options_get_one_line(tmp_path):
    folder = three_tars(tmp_path / "set")
    with pytest.raises(UserError, match="comes twice"):
        index(folder, folder / "set-1.tar", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="--require"):
        index(folder, "--out", tmp_path / "out", "--require", "JPG")
