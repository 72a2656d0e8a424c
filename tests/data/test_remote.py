"""Training from remote shards: the same batches as from local ones, through a cache that may hold only a part."""

import fcntl
import functools
import http.server
import shutil
import threading
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dalle_scale.config import DataConfig
from dalle_scale.curation.shard_writer import ShardWriter, commit
from dalle_scale.data import codes
from dalle_scale.data.manifest import Manifest, index_path, index_table
from dalle_scale.data.pipeline import open_stream
from dalle_scale.types import BatchSpec, UserError

INPUTS = BatchSpec(num_codes=9, code_vocab=50)
SAMPLES = 240


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts what is asked for."""

    asked: Counter[str]

    def do_GET(self):
        self.asked[self.path] += 1
        super().do_GET()

    def log_message(self, *unused):
        pass


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """240 samples of codes in 24 shards of 10."""
    folder = tmp_path_factory.mktemp("remote") / "local"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=10, info={"vocab": 50, "grids": [3]}) as writer:
        for index in range(SAMPLES):
            writer.add(f"{index:04d}", {codes.MEMBER: codes.pack(rng.integers(0, 50, 9))})
    return folder


@pytest.fixture
def remote(local, tmp_path):
    """The same data set with its shards behind a server: folder of the manifest, requests by path, folder served."""
    served = tmp_path / "served"
    shutil.copytree(local, served, ignore=shutil.ignore_patterns("index", "*.parquet"))
    asked: Counter[str] = Counter()
    handler = functools.partial(type("Counting", (Handler,), {"asked": asked}), directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    manifest, folder = Manifest.open(local), tmp_path / "manifest"
    (folder / "index").mkdir(parents=True)
    for number, shard in enumerate(manifest.shards):
        index = manifest.index(number)
        entries = {name: [index.entry(row, name) for row in range(len(index.keys))] for name in index.members}
        url = f"http://127.0.0.1:{server.server_address[1]}/{shard.url}"
        table = index_table(url, shard.size_bytes, shard.sha256, index.keys.to_pylist(), entries)
        pq.write_table(table, index_path(folder, number))
    commit(folder, manifest.info)
    yield folder, asked, served
    server.shutdown()
    server.server_close()


def stream(folder, cache=None, workers=0, cache_gib=1.0, window_shards=4):
    config = DataConfig(
        train=str(folder), workers=workers, cache=cache and str(cache), cache_gib=cache_gib, window_shards=window_shards
    )
    return open_stream(config, str(folder), INPUTS, seed=1, global_batch_size=16, micro_batch_size=16, rank=0,
                       world_size=1, train=True, ledger=None)  # fmt: skip


def batches(one, start=0, stop=30):
    return [batch for (batch,) in one.batches(start, stop)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_shards_and_a_shard_is_fetched_once(local, remote, tmp_path, workers):
    folder, asked, _ = remote
    for mine, theirs in zip(batches(stream(folder, tmp_path / "cache", workers)), batches(stream(local)), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("codes", "weight"))
        assert mine["id"].tolist() == theirs["id"].tolist()
    assert set(asked.values()) == {1} and len(asked) == 24


def test_a_cache_of_two_windows_is_enough(local, remote, tmp_path):
    folder, asked, _ = remote
    size_bytes = Manifest.open(local).shard(0).size_bytes
    cap = 8 * size_bytes / 2**30
    with pytest.raises(UserError, match=r"data\.cache_gib: .* less than two windows"):
        stream(folder, tmp_path / "cache", cache_gib=cap * 0.99)
    one, most = stream(folder, tmp_path / "cache", cache_gib=cap), 0
    for number, (batch,) in enumerate(one.batches(0, 15)):
        assert batch["codes"].equal(batches(stream(local), number, number + 1)[0]["codes"])
        with (tmp_path / "cache" / ".lock").open("wb") as lock:  # nothing is removed or renamed meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX)
            most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("[!.]*")))
    assert most <= 8 * size_bytes
    assert len(asked) == 24


def test_a_shard_that_cannot_be_had_stops_the_run_with_one_line(remote, tmp_path):
    folder, _, served = remote
    (served / "shard-000003.tar").unlink()
    with pytest.raises(
        UserError, match=r"cannot fetch a shard: http://.*/shard-000003\.tar: .*; the same command continues"
    ):
        batches(stream(folder, tmp_path / "cache"))


def test_remote_shards_need_a_cache(remote):
    with pytest.raises(UserError, match=r"its shards are remote; name a folder for them: data\.cache=\.\.\."):
        stream(remote[0])
