"""Train a caption tokenizer: the captions of a data set -> a sentencepiece BPE model.

    python data_tools/train_tokenizer.py --data runs/data/train --out runs/data --vocab 16384

Lower-casing is part of the model (normalisation nmt_nfkc_cf), and characters it has never seen are spelled out in
bytes. The same data set gives the same file on every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece

from dalle_scale import io, log
from dalle_scale.arguments import Parser, at_least, share
from dalle_scale.data import text
from dalle_scale.data.decode import BadSample
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.order import sample_seeds
from dalle_scale.data.reader import Reader
from dalle_scale.types import UserError

_LONGEST_BYTES = 1 << 16  # sentencepiece would leave out longer captions without a word


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, print how long the captions came out."""
    parser = Parser(__doc__)
    parser.add_data("folder of a data set with captions")
    parser.add_out("folder of text.model")
    parser.add_argument("--vocab", type=at_least(1), default=16_384, metavar="N", help="tokens")
    parser.add_argument("--character-coverage", type=share, default=1.0, help="share of the characters with a token")
    parser.add_argument("--no-byte-fallback", action="store_true", help="unknown characters become one unknown token")
    parser.add_limit("train on at most so many captions, picked by hash", 10_000_000)
    args = parser.parse_args(arguments)
    captions = list(read_captions(args.data, args.limit))
    model = train(captions, args.vocab, args.character_coverage, byte_fallback=not args.no_byte_fallback)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "text.model"
    io.write(path, model)
    log.say(f"{path}: {describe(path, captions)}")


def read_captions(folder: Path, limit: int) -> Iterator[str]:
    """Captions of the data set; of more than `limit`, those with the lowest hashes of their numbers."""
    manifest = Manifest.open(folder)
    if "txt" not in manifest.members:
        raise UserError(f"{folder}: no captions (txt) in this data set; it holds {', '.join(manifest.members)}")
    ids = np.arange(manifest.num_samples)
    if len(ids) > limit:
        ids = np.sort(np.argsort(sample_seeds(0, 0, ids), kind="stable")[:limit])
    reader, bad = Reader(manifest), 0
    for sample in log.progress(ids.tolist(), "captions", "captions", total=len(ids)):
        try:
            yield reader.read(sample, "txt").decode()
        except (BadSample, UnicodeDecodeError):
            bad += 1
    reader.close()
    if bad:
        log.say(f"{folder}: {bad:,} captions cannot be read and were left out")


def train(captions: list[str], vocab: int, character_coverage: float, byte_fallback: bool) -> bytes:
    """The bytes of a sentencepiece BPE model with `vocab` pieces; piece 0 is "unknown", there is no start or end.

    Raises:
        UserError: the captions do not give that many pieces, or the vocabulary has no room for their characters.
    """
    file = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            normalization_rule_name="nmt_nfkc_cf",
            max_sentence_length=_LONGEST_BYTES,
            shuffle_input_sentence=False,
            num_threads=1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"--vocab {vocab}: sentencepiece says: {reason}") from None
    return file.getvalue()


def describe(path: Path, captions: list[str]) -> str:
    """Vocabulary and length statistics in one line."""
    tokenizer = text.open_text(path)
    lengths = np.array([len(tokenizer.pieces(caption)) for caption in captions])
    return (
        f"{tokenizer.vocab:,} tokens; {len(captions):,} captions of {lengths.mean():.1f} tokens on average, "
        f"99 % have at most {np.percentile(lengths, 99):.0f}, the longest {lengths.max()}"
    )


if __name__ == "__main__":
    log.guarded(main)
