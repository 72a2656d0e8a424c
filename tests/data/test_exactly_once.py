"""Every sample of the manifest is delivered once an epoch or stands in the ledger, and every batch is the same bit for
bit, at any world size and worker count, across changes of both, and after kill -9."""

import io
import json
import random
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.deliver import BATCH_SIZE, digest, merged, open_ranks
from support.processes import HANG_SECONDS, environment

from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data import codes, ledger
from dalle_scale.data.manifest import Manifest

SAMPLES = 997  # prime
BAD = {3: "txt", 100: "png", 101: "codes", 555: "png", 996: "txt"}
EPOCH = -(-SAMPLES // BATCH_SIZE)  # batches


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """Folder of a data set in shards of uneven sizes with five bad samples; text tokenizer."""
    folder = tmp_path_factory.mktemp("once")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "train", samples_per_shard=71, info={"vocab": 50, "grids": [3]}) as writer:
        for index in range(SAMPLES):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(file, "PNG")
            members = {"png": file.getvalue(), "txt": f"image number {index}".encode()}
            members["codes"] = codes.pack(rng.integers(0, 50, 9))
            if index in BAD:
                members[BAD[index]] = b"\xff"
            writer.add(f"{index:04d}", members)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"image number {index}" for index in range(300)),
        model_prefix=str(folder / "bpe"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return str(folder / "train"), str(folder / "bpe.model")


@pytest.fixture(scope="module")
def reference(data) -> list[str]:
    """Digests of two and a half epochs, from one rank without workers."""
    [stream] = open_ranks(*data, world_size=1, workers=0, micro=BATCH_SIZE)
    return [digest(merged([parts])) for parts in stream.batches(0, 2 * EPOCH + 3)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8])
def test_delivered_and_ledger_are_the_manifest(data, reference, tmp_path, world_size, workers):
    micro, path = BATCH_SIZE // world_size, tmp_path / "ledger.jsonl"
    ranks = open_ranks(*data, world_size, workers, micro, path, threads=2 if workers == 1 else 1)
    iterators = [rank.batches(0, EPOCH) for rank in ranks]
    batches = [merged(list(parts)) for parts in zip(*iterators, strict=True)]
    assert [digest(batch) for batch in batches] == reference[:EPOCH]
    delivered = Counter(sample for batch in batches for sample in batch["id"].tolist() if sample >= 0)
    assert set(delivered.values()) == {1}
    lost = Counter(int(row["key"]) for row in ledger.read(tmp_path / "ledger.jsonl"))
    assert lost == Counter(BAD.keys())
    assert set(delivered) | set(lost) == set(range(SAMPLES)) and not set(delivered) & set(lost)


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 2 * EPOCH + 3), max_size=5),
    topologies=st.lists(st.sampled_from([1, 2, 3, 4, 6, 7, 8]), min_size=6, max_size=6),
    split=st.lists(st.sampled_from([1, 3]), min_size=6, max_size=6),
)
def test_changing_the_topology_at_any_batch_changes_nothing(data, reference, cuts, topologies, split):
    borders = sorted({0, *cuts, 2 * EPOCH + 3})
    found = []
    for start, stop, world_size, parts in zip(borders, borders[1:], topologies, split, strict=False):
        share = BATCH_SIZE // world_size
        ranks = open_ranks(*data, world_size, 0, share // parts if share % parts == 0 else share)
        iterators = [rank.batches(start, stop) for rank in ranks]
        found += [digest(merged(list(steps))) for steps in zip(*iterators, strict=True)]
    assert found == reference


def test_after_kill_9_every_batch_is_what_it_was(data, reference, tmp_path):
    rng = random.Random(0)
    for attempt in range(4):
        command = [sys.executable, "-m", "support.deliver", *data, str(tmp_path), f"--stop={len(reference)}"]
        command += [f"--world-size={rng.choice([1, 2, 3, 4])}", f"--workers={rng.choice([0, 1, 2])}"]
        command += [f"--killed-after={rng.randrange(1, 6)}"] if attempt < 3 else []
        done = subprocess.run(command, env=environment(), start_new_session=True, timeout=HANG_SECONDS)
        assert done.returncode == (-signal.SIGKILL if attempt < 3 else 0)
    rows = [line.split() for line in (tmp_path / "digests").read_text().splitlines()]
    assert {int(number) for number, _ in rows} == set(range(len(reference)))
    assert all(value == reference[int(number)] for number, value in rows)
    rows_lost = [(row["key"], row["epoch"]) for row in ledger.read(tmp_path / "ledger.jsonl")]
    assert len(rows_lost) == len(set(rows_lost))
    for epoch in (0, 1):
        assert sorted(int(key) for key, number in rows_lost if number == epoch) == sorted(BAD)


def test_state_is_small_and_says_where(data):
    manifest = Manifest.open(data[0])
    [stream] = open_ranks(*data, world_size=1, workers=0, micro=BATCH_SIZE)
    state = stream.state(2 * EPOCH + 1)
    assert len(json.dumps(state).encode()) <= 1024
    assert (state["manifest_digest"], state["epoch"], state["next_batch"]) == (manifest.digest, 2, 2 * EPOCH + 1)
