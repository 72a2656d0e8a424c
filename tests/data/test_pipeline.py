"""Batches hold what the shards hold, once an epoch, the same at any topology; faults are counted and named."""

import io
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from dalle_scale.config import DataConfig, SourceConfig
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.data import codes
from dalle_scale.data.ledger import read as read_ledger
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.pipeline import Stream, open_stream
from dalle_scale.data.pool import RetryMode
from dalle_scale.data.rows import RowReader
from dalle_scale.types import Batch, BatchSpec, UserError

SAMPLES, SIZE, GRID, VOCAB, TEXT_VOCAB = 53, 8, 3, 50, 300
INPUTS = BatchSpec(
    image_size=SIZE,
    augment="dvae",
    text_length=6,
    text_vocab=TEXT_VOCAB,
    bpe_dropout=0.2,
    num_codes=GRID**2,
    code_vocab=VOCAB,
)
PLAIN = BatchSpec(image_size=SIZE, text_length=40, text_vocab=TEXT_VOCAB, num_codes=GRID**2, code_vocab=VOCAB)


def sample(index: int) -> dict[str, bytes]:
    """Image, caption and codes that all say `index`."""
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    values = np.random.default_rng(index).integers(0, VOCAB, GRID**2)
    return {"png": file.getvalue(), "txt": f"image number {index}".encode(), "codes": codes.pack(values)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train"
    with ShardWriter(path, samples_per_shard=10, info={"kind": "codes", "vocab": VOCAB, "grids": [GRID]}) as writer:
        for index in range(SAMPLES):
            writer.add(f"{index:04d}", sample(index))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "bpe"
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"image number {rng.randrange(1000)}" for _ in range(300)),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=TEXT_VOCAB,
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return f"{path}.model"


def stream(folder: Path, bpe: str | None, inputs: BatchSpec = INPUTS, **changes) -> Stream:
    config = DataConfig(
        train=str(folder),
        text_tokenizer=bpe,
        workers=changes.pop("workers", 0),
        max_bad_share=changes.pop("max_bad_share", 1.0),
    )
    options = {"seed": 1, "global_batch_size": 12, "rank": 0, "world_size": 1, "train": True, "ledger": None} | changes
    options.setdefault("micro_batch_size", options["global_batch_size"] // options["world_size"])
    return open_stream(config, str(folder), inputs, **options)


def whole(streams: list[Stream], start: int, stop: int) -> list[Batch]:
    """Global batches, put together from the micro-batches of all ranks."""
    ranks = [list(one.batches(start, stop)) for one in streams]
    return [
        {key: torch.cat([rank[micro][key] for micro in range(len(step[0])) for rank in step]) for key in step[0][0]}
        for step in zip(*ranks, strict=True)
    ]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_batches_hold_what_was_written(folder, bpe):
    one = stream(folder, bpe, PLAIN)
    reference = sentencepiece.SentencePieceProcessor(model_file=bpe)
    assert (one.num_samples, one.batches_per_epoch) == (SAMPLES, 5)
    seen = []
    for (batch,) in one.batches(0, 5):
        assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
            "image": (torch.uint8, (12, 3, SIZE, SIZE)),
            "text": (torch.int64, (12, 40)),
            "codes": (torch.int64, (12, GRID**2)),
            "id": (torch.int64, (12,)),
            "seed": (torch.int64, (12,)),
            "weight": (torch.float32, (12,)),
        }
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        for row, index in enumerate(batch["id"].tolist()):
            seen.append(index)
            assert batch["weight"][row] == (index >= 0)
            if index < 0:
                assert not batch["image"][row].any() and not batch["text"][row].any() and not batch["codes"][row].any()
                continue
            written = sample(index)
            image = np.asarray(Image.open(io.BytesIO(written["png"])))
            assert np.array_equal(batch["image"][row].permute(1, 2, 0).numpy(), image)
            assert np.array_equal(batch["codes"][row].numpy(), np.frombuffer(written["codes"], "<u2"))
            pieces = reference.encode(written["txt"].decode())
            assert batch["text"][row].tolist() == pieces + list(range(TEXT_VOCAB + len(pieces), TEXT_VOCAB + 40))
    assert sorted(seen) == [-1] * 7 + list(range(SAMPLES))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 6), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_same_batches_at_any_world_size(folder, bpe, world_size, micro):
    ranks = [
        stream(folder, bpe, world_size=world_size, rank=rank, micro_batch_size=micro) for rank in range(world_size)
    ]
    assert_same(whole(ranks, 3, 7), whole([stream(folder, bpe)], 3, 7))


def test_same_batches_from_workers(folder, bpe):
    one = stream(folder, bpe, workers=2)
    assert_same(whole([one], 2, 9), whole([stream(folder, bpe)], 2, 9))


def test_going_on_in_the_middle_changes_nothing(folder, bpe):
    straight = whole([stream(folder, bpe)], 0, 12)
    resumed = stream(folder, bpe)
    assert_same(whole([resumed], 7, 12), straight[7:])
    left = resumed.batches(0, 12)
    next(left)
    left.close()
    assert_same(whole([resumed], 0, 2), straight[:2])
    assert list(resumed.batches(5, 5)) == []


def test_epochs_differ_in_order_seed_augmentation_and_pieces(folder, bpe):
    one = stream(folder, bpe)
    first, second = ({}, {})
    for epoch, rows in enumerate((first, second)):
        for batch in whole([one], 5 * epoch, 5 * epoch + 5):
            for row, index in enumerate(batch["id"].tolist()):
                rows[index] = (batch["seed"][row].item(), batch["image"][row], batch["text"][row])
    assert list(first) != list(second)
    assert all(first[index][0] != second[index][0] for index in range(SAMPLES))
    flipped = sum(not torch.equal(first[index][1], second[index][1]) for index in range(SAMPLES))
    cut = sum(not torch.equal(first[index][2], second[index][2]) for index in range(SAMPLES))
    assert 15 < flipped < 40 and cut > 10
    other = whole([stream(folder, bpe, seed=2)], 0, 5)
    assert [batch["id"].tolist() for batch in other] != [batch["id"].tolist() for batch in whole([one], 0, 5)]


def test_validation_is_the_same_on_every_pass(folder, bpe):
    one = stream(folder, bpe, train=False)
    passes = whole([one], 0, 10)
    assert_same(passes[:5], passes[5:])
    ids = torch.cat([batch["id"] for batch in passes[:5]])[:SAMPLES].tolist()
    assert sorted(ids) == list(range(SAMPLES))
    assert_same(whole([stream(folder, bpe, train=False, seed=7)], 0, 5), passes[:5])
    first = np.asarray(Image.open(io.BytesIO(sample(ids[0])["png"])))
    assert np.array_equal(passes[0]["image"][0].permute(1, 2, 0).numpy(), first), "no flip"


def test_state_is_small_and_belongs_to_data_seed_and_batch(folder, bpe):
    one = stream(folder, bpe)
    state = json.loads(json.dumps(one.state(next_batch=11)))
    assert len(json.dumps(state)) < 1024 and (state["epoch"], state["next_batch"]) == (2, 11)
    stream(folder, bpe, world_size=2).check(state)
    for other in (stream(folder, bpe, seed=2), stream(folder, bpe, global_batch_size=24)):
        with pytest.raises(UserError, match="the checkpoint was written with"):
            other.check(state)
    with pytest.raises(UserError, match="manifest_digest"):
        one.check({**state, "manifest_digest": "other"})


@pytest.fixture
def damaged(tmp_path) -> tuple[Path, dict[str, str]]:
    """120 samples with one fault of each kind, and the expected reasons by key."""
    path = tmp_path / "damaged"
    faults = {
        10: ({"png": b"\x89PNG\r\n\x1a\n and no more"}, "cannot decode"),
        21: ({"txt": b"\xff\xfe"}, "not UTF-8"),
        32: ({"codes": codes.pack(np.full(GRID**2, VOCAB))}, f"code {VOCAB} is not below {VOCAB}"),
        43: ({"codes": codes.pack(np.zeros(4, np.int64))}, "4 codes instead of 9"),
        54: ({"txt": None}, "no member 'txt'"),
        65: ({"png": None}, "no image"),
        76: ({}, "checksum of 'png'"),
    }
    with ShardWriter(path, samples_per_shard=50, info={"kind": "codes"}) as writer:
        for index in range(120):
            members = sample(index) | faults.get(index, ({}, ""))[0]
            writer.add(f"{index:04d}", {name: data for name, data in members.items() if data is not None})
    manifest = Manifest.open(path)
    with (path / "shard-000001.tar").open("r+b") as file:
        file.seek(int(manifest.entry(76, "png").offset) + 40)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return path, {f"{index:04d}": reason for index, (_, reason) in faults.items()}


def test_bad_samples_keep_their_slot_and_fill_the_ledger(damaged, bpe, tmp_path):
    folder, expected = damaged
    ledger = tmp_path / "run" / "ledger.jsonl"
    ranks = [
        stream(folder, bpe, PLAIN, global_batch_size=16, world_size=2, rank=rank, ledger=ledger) for rank in range(2)
    ]
    batches = whole(ranks, 0, 8)
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {row["key"] for row in rows} == expected.keys() and len(rows) == len(expected)
    for row in rows:
        assert expected[row["key"]] in row["reason"]
        assert row["shard"] == str(folder / f"shard-{int(row['key']) // 50:06d}.tar")
        assert row["epoch"] == 0 and 0 <= row["step"] < 8
    ids = torch.cat([batch["id"] for batch in batches])
    weights = torch.cat([batch["weight"] for batch in batches])
    bad = sorted(int(key) for key in expected)
    assert sorted(ids[ids >= 0].tolist()) == [index for index in range(120) if index not in bad]
    assert torch.equal(weights, (ids >= 0).float())
    for key in ("image", "text", "codes"):
        content = torch.cat([batch[key] for batch in batches])
        assert not content[ids < 0].any()
    good = [index for index in range(120) if index not in bad]
    for batch in batches:
        for row, index in enumerate(batch["id"].tolist()):
            if index in good:
                assert np.array_equal(batch["codes"][row].numpy(), np.frombuffer(sample(index)["codes"], "<u2"))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(damaged, bpe, workers):
    folder, expected = damaged
    share = (len(expected) - 0.5) / 120
    with pytest.raises(UserError, match=r"7 of 1\d\d samples cannot be read.*max_bad_share"):
        list(stream(folder, bpe, PLAIN, max_bad_share=share, workers=workers, global_batch_size=60).batches(0, 9))
    list(stream(folder, bpe, PLAIN, max_bad_share=0.08, global_batch_size=60).batches(0, 4))


def test_cut_captions_are_said_once(folder, bpe, capsys):
    pieces = sentencepiece.SentencePieceProcessor(model_file=bpe)
    cut = sum(len(pieces.encode(sample(index)["txt"].decode())) > 3 for index in range(SAMPLES))
    assert cut > 10
    list(stream(folder, bpe, BatchSpec(text_length=3, text_vocab=TEXT_VOCAB)).batches(0, 12))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"{cut} of {SAMPLES} samples" in lines[0] and "truncated to the text length" in lines[0]
    list(stream(folder, bpe, PLAIN).batches(0, 12))
    assert capsys.readouterr().out == ""


def test_no_descriptor_is_left_open(folder, bpe):
    one = stream(folder, bpe)
    list(one.batches(0, 5))
    before = len(os.listdir("/proc/self/fd"))
    for epoch in range(20):
        list(one.batches(5 * epoch, 5 * epoch + 5))
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (BatchSpec(num_codes=16, code_vocab=VOCAB), "images are 3 x 3 codes, the model takes 16"),
        (BatchSpec(num_codes=9, code_vocab=VOCAB - 1), "vocabulary of 50, the model has room for 49"),
        (BatchSpec(text_length=4, text_vocab=TEXT_VOCAB - 1), "300 tokens, the model has room for 299"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(folder, bpe, inputs, message):
    with pytest.raises(UserError, match=message):
        stream(folder, bpe, inputs)


def test_what_the_data_does_not_hold_is_refused(tmp_path, folder, bpe):
    with ShardWriter(tmp_path / "bare") as writer:
        writer.add("a", {"json": b"{}"})
    for inputs, message in [
        (BatchSpec(image_size=8), "needs images, the data set has none .it holds: json"),
        (BatchSpec(text_length=4, text_vocab=TEXT_VOCAB), "needs captions"),
        (BatchSpec(num_codes=9, code_vocab=VOCAB), "needs image codes"),
    ]:
        with pytest.raises(UserError, match=message):
            stream(tmp_path / "bare", bpe, inputs)
    with pytest.raises(UserError, match=r"data\.text_tokenizer"):
        stream(folder, None, PLAIN)
    with pytest.raises(UserError, match=r"no such text tokenizer"):
        stream(folder, str(tmp_path / "x.model"), PLAIN)
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        stream(tmp_path / "nowhere", bpe)


def mixture(folder: Path, other: Path, bpe: str, **changes) -> Stream:
    """Three parts of `folder` and one of `other`."""
    parts = (SourceConfig(path=str(folder), weight=3), SourceConfig(path=str(other), weight=1))
    config = DataConfig(train=parts, text_tokenizer=bpe, workers=changes.pop("workers", 0))
    options = {"seed": 1, "global_batch_size": 12, "rank": 0, "world_size": 1, "train": True, "ledger": None} | changes
    options.setdefault("micro_batch_size", options["global_batch_size"] // options["world_size"])
    return open_stream(config, config.train, PLAIN, **options)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """31 more samples."""
    path = tmp_path_factory.mktemp("data") / "other"
    with ShardWriter(path, samples_per_shard=20, info={"kind": "codes", "vocab": VOCAB, "grids": [GRID]}) as writer:
        for index in range(31):
            writer.add(f"{index:04d}", sample(1000 + index))
    return path


def test_a_mixture_holds_its_shares_and_each_set_once_a_round(folder, other, bpe):
    batches = whole([mixture(folder, other, bpe)], 0, 40)
    ids = torch.cat([batch["id"] for batch in batches])
    assert bool((torch.cat([batch["weight"] for batch in batches]) == 1).all()), "no empty slots"
    of_first, of_second = ids[ids < SAMPLES], ids[ids >= SAMPLES] - SAMPLES
    assert abs(len(of_first) / len(ids) - 0.75) < 0.05
    for drawn, size in ((of_first, SAMPLES), (of_second, 31)):
        rounds = len(drawn) // size
        assert rounds >= 3
        for number in range(rounds):
            assert sorted(drawn[number * size : (number + 1) * size].tolist()) == list(range(size))
    for batch in batches[:3]:
        for row, number in enumerate(batch["id"].tolist()):
            index = number if number < SAMPLES else 1000 + number - SAMPLES
            assert np.array_equal(batch["codes"][row].numpy(), np.frombuffer(sample(index)["codes"], "<u2"))


@pytest.mark.parametrize(("world_size", "micro", "workers"), [(2, 3, 0), (3, 4, 0), (4, 1, 0), (2, 6, 1)])
def test_a_mixture_is_the_same_at_any_topology(folder, other, bpe, world_size, micro, workers):
    options = {"world_size": world_size, "micro_batch_size": micro, "workers": workers}
    ranks = [mixture(folder, other, bpe, rank=rank, **options) for rank in range(world_size)]
    assert_same(whole(ranks, 5, 11), whole([mixture(folder, other, bpe)], 0, 11)[5:])
    state = ranks[0].state(5)
    assert len(json.dumps(state)) < 1024
    with pytest.raises(UserError, match="manifest_digest"):
        stream(folder, bpe, PLAIN).check(state)


def test_mixtures_that_cannot_be_are_refused(folder, other, bpe, tmp_path):
    def opening(*parts: SourceConfig) -> None:
        open_stream(DataConfig(train=parts, text_tokenizer=bpe), parts, PLAIN, seed=1, global_batch_size=12,
                    micro_batch_size=12, rank=0, world_size=1, train=True, ledger=None)  # fmt: skip

    with pytest.raises(UserError, match="empty list"):
        opening()
    with pytest.raises(UserError, match="the same data set twice"):
        opening(SourceConfig(path=str(folder)), SourceConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"weight 0\.0001 is less than one sample in 4096"):
        opening(SourceConfig(path=str(folder)), SourceConfig(path=str(other), weight=0.0001))
    with pytest.raises(UserError, match=r"nowhere.*no such file"):
        opening(SourceConfig(path=str(folder)), SourceConfig(path=str(tmp_path / "nowhere")))


def test_a_sample_that_kills_its_reader_is_left_out(folder, bpe, tmp_path):
    """A decoder that crashes takes its process with it, not the run."""
    ledger = tmp_path / "ledger.jsonl"
    one = stream(folder, bpe, PLAIN, workers=1, ledger=ledger)
    one._rows = DeadlyRows(one._rows, sample=17)
    ids = torch.cat([batch["id"] for batch in whole([one], 0, 5)])
    assert sorted(ids[ids >= 0].tolist()) == [index for index in range(SAMPLES) if index != 17]
    [row] = read_ledger(ledger)
    assert row["key"] == "0017" and row["reason"] == "ended the process that read it: signal 11"


class DeadlyRows:
    """Rows whose reading ends in a segmentation fault at one sample."""

    def __init__(self, rows: RowReader, sample: int) -> None:
        self.plan, self.rows, self.sample = rows.plan, rows, sample

    def read(self, number: int, retry_mode: RetryMode | None = None):
        samples = self.plan.slots(number).sample.tolist()
        row = samples.index(self.sample) if self.sample in samples else -1
        if row >= 0 and (retry_mode is None or row not in retry_mode.skip):
            if retry_mode:
                retry_mode.at_row(row)
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.rows.read(number, retry_mode)


def test_a_batch_that_somebody_holds_is_never_written_over(folder, bpe):
    kept = whole([stream(folder, bpe, PLAIN)], 0, 12)
    once = whole([stream(folder, bpe, PLAIN)], 0, 12)
    again = [{key: value.clone() for key, value in batch.items()} for batch in once]
    assert_same(kept, again)
    views = [batch["image"][3:5] for (batch,) in stream(folder, bpe, PLAIN).batches(0, 12)]
    assert all(torch.equal(view, batch["image"][3:5]) for view, batch in zip(views, again, strict=True))
