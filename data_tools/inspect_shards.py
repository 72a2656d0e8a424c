"""Look at a data set: some of its samples on one sheet.

    python data_tools/inspect_shards.py --data runs/images/shards/train [--limit 48] [--match dog] [--out sheets]

Writes <out>/sheet.html and <out>/sheet.png: images with their captions, each with its key, shard and size. --seed
chooses the samples; --match takes only those whose caption holds a text (it reads all captions), --keys names them. A
sample that cannot be read stands there with the reason. Of code shards `--tokenizer EXPORT` shows what their codes
decode to, beside the image where there is one.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import dalle_scale.log  # noqa: F401 names the extra if pyarrow is missing  # isort: skip
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, ImageDraw

from dalle_scale import log
from dalle_scale.arguments import Parser
from dalle_scale.checkpoint.export import open_tokenizer
from dalle_scale.data import codes
from dalle_scale.data.decode import BadSample, Pixels, decode
from dalle_scale.data.manifest import Manifest
from dalle_scale.data.reader import Reader
from dalle_scale.report import gallery
from dalle_scale.report.page import GalleryImage
from dalle_scale.types import ImageTokenizer, UserError

LONGEST_SIDE = 256  # pixels; a larger image is shown smaller
LONGEST_CAPTION = 400  # characters that are shown
COLUMNS = {"image": "image", "codes": "decoded from codes"}


class Source(NamedTuple):
    """An opened data set and what is shown of it."""

    manifest: Manifest
    reader: Reader
    tokenizer: ImageTokenizer | None
    parts: tuple[str, ...]  # keys of `COLUMNS`


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, choose samples, draw them."""
    parser = Parser(__doc__)
    parser.add_data()
    parser.add_limit("samples; fewer where there are not as many", 48)
    parser.add_seed()
    parser.add_argument("--keys", help="these samples, with commas between")
    parser.add_argument("--match", help="only samples whose caption holds this text, in any case")
    parser.add_argument("--tokenizer", type=Path, help="export of an image tokenizer, to decode codes with")
    parser.add_out("folder of sheet.html and sheet.png", Path("."))
    args = parser.parse_args(arguments)
    if args.keys is not None and args.match is not None:
        raise UserError("--keys and --match: give one of them")
    source = open_source(args.data, args.tokenizer)
    manifest, total = source.manifest, source.manifest.num_samples
    if args.keys is not None:
        samples = find_keys(manifest, args.keys.split(","))
    elif args.match is not None:
        samples = find_text(source, args.match, args.limit, args.seed)
    else:
        samples = sorted(random.Random(args.seed).sample(range(total), min(args.limit, total)))
    rows, bad = [], 0
    for sample in log.progress(samples, "read", "samples"):
        row, is_bad = show(source, sample)
        rows.append(row)
        bad += is_bad
    notes = [f"{len(rows):,} of {total:,} samples in {manifest.num_shards:,} shards; {bad:,} of these cannot be read"]
    columns = [COLUMNS[part] for part in source.parts]
    gallery.save(args.out, f"Data set {manifest.folder.name}", columns, rows, notes, "sheet")
    log.say(f"{args.out / 'sheet.html'}, {args.out / 'sheet.png'}: {len(rows)} samples, {bad} of them cannot be read")


def open_source(folder: Path, export: Path | None) -> Source:
    """The data set, and the tokenizer where its codes are to be shown.

    Raises:
        UserError: there is nothing to show, or the tokenizer is not the one that the codes were made with.
    """
    manifest = Manifest.open(folder)
    if manifest.has_remote_shards:
        raise UserError(f"{folder}: has remote shards; fetch the data set into a folder and inspect that")
    has_codes = codes.MEMBER in manifest.members
    if export is not None and not has_codes:
        raise UserError(f"{folder}: holds no codes, so --tokenizer has nothing to decode; leave it out")
    parts = ("image",) * manifest.holds_images + ("codes",) * (export is not None)
    if not parts:
        hint = "give --tokenizer EXPORT to decode its codes" if has_codes else "there is nothing to show"
        raise UserError(f"{folder}: holds no images, only {', '.join(manifest.members)}; {hint}")
    tokenizer = None if export is None else open_tokenizer(export)
    if tokenizer is not None:
        for name, value in (("vocab", tokenizer.vocab), ("grids", list(tokenizer.grids))):
            if manifest.info.get(name, value) != value:
                made_with = f"{folder}: its codes have {name} {manifest.info[name]}"
                raise UserError(f"{made_with}, {export} has {value}; give the tokenizer they were made with")
    return Source(manifest, Reader(manifest), tokenizer, parts)


# ---- which samples ----


def find_keys(manifest: Manifest, keys: list[str]) -> list[int]:
    """The samples of these keys, in their order; raises UserError where there is no such key."""
    found: dict[str, int] = {}
    wanted = pa.array(keys, pa.string())
    for shard in log.progress(range(manifest.num_shards), "look for keys", "shards"):
        column = manifest.index(shard).keys
        for row in np.flatnonzero(pc.is_in(column, value_set=wanted).to_numpy()).tolist():
            found[column[row].as_py()] = manifest.samples(shard)[row]
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{manifest.folder}: no sample with the key '{missing[0]}' ({len(missing)} of --keys missing)")
    return [found[key] for key in dict.fromkeys(keys)]


def find_text(source: Source, text: str, count: int, seed: int) -> list[int]:
    """Up to `count` samples whose caption holds the text, chosen by hash among all that do."""
    if "txt" not in source.manifest.members:
        raise UserError(f"{source.manifest.folder}: holds no captions, so --match finds nothing; leave it out")
    wanted = text.casefold()

    def matching() -> Iterator[tuple[bytes, int]]:
        for sample in log.progress(range(source.manifest.num_samples), "look for text", "captions"):
            try:
                caption = source.reader.read(sample, "txt").decode()
            except (BadSample, UnicodeDecodeError):
                continue
            if wanted in caption.casefold():
                yield hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=8).digest(), sample

    found = heapq.nsmallest(count, matching())
    if not found:
        raise UserError(f"{source.manifest.folder}: no caption that can be read holds '{text}'")
    return sorted(sample for _, sample in found)


# ---- how they look ----


def show(source: Source, sample: int) -> tuple[gallery.Row, bool]:
    """The sample as a row of the gallery, and whether anything of it cannot be read."""
    manifest = source.manifest
    shard = Path(manifest.shard(manifest.locate(sample)[0]).url).stem
    caption, bad = "", False
    if "txt" in manifest.members:
        try:
            caption = shortened(source.reader.read(sample, "txt").decode()) or "(empty caption)"
        except (BadSample, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, BadSample) else "it is not UTF-8"
            caption, bad = f"(caption cannot be read: {reason})", True
    images = []
    for part in source.parts:
        try:
            pixels, about = load(source, part, sample)
            image = to_tensor(fitted(pixels))
        except BadSample as error:
            image, about, bad = to_tensor(placeholder()), f"cannot be read: {plain(error)}", True
        images.append(GalleryImage(image, note=f"{manifest.key(sample)} · {shard} · {about}"))
    return gallery.Row(caption, tuple(images)), bad


def load(source: Source, part: str, sample: int) -> tuple[Pixels, str]:
    """Pixels [H, W, 3] of an image or of decoded codes, and their size in words.

    Raises:
        BadSample: they cannot be read or decoded.
    """
    if part == "image":
        data = source.reader.read_image(sample)
        pixels = decode(data)
        return pixels, f"{pixels.shape[1]} x {pixels.shape[0]} · {len(data):,} bytes"
    tokenizer = source.tokenizer
    assert tokenizer is not None, "open_source adds this part only with a tokenizer"
    data = source.reader.read(sample, codes.MEMBER)
    values = codes.unpack(data, codes.count(tokenizer.grids), tokenizer.vocab)
    with torch.inference_mode():
        [image] = tokenizer.decode(torch.from_numpy(values.astype(np.int64))[None])
    distinct = len(set(values.tolist()))
    return image.permute(1, 2, 0).numpy(), f"{codes.describe(tokenizer.grids)} · {distinct} distinct"


def plain(error: BadSample) -> str:
    """Reason why an image cannot be read, without the memory address in Pillow's message."""
    return re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error))


def shortened(caption: str) -> str:
    """The caption on one line, at most `LONGEST_CAPTION` characters of it."""
    line = " ".join(caption.split())
    if len(line) <= LONGEST_CAPTION:
        return line
    return f"{line[:LONGEST_CAPTION]}… ({len(line):,} characters)"


def fitted(pixels: Pixels) -> Pixels:
    """The whole image, shrunk where it is larger than `LONGEST_SIDE`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


def placeholder() -> Pixels:
    """A crossed-out tile where an image cannot be read."""
    tile = Image.new("RGB", (128, 128), "#d1d9e0")
    pen = ImageDraw.Draw(tile)
    for line in ((0, 0, 127, 127), (0, 127, 127, 0)):
        pen.line(line, fill="#cf222e", width=3)
    return np.asarray(tile)


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """[H, W, 3] -> uint8 [3, H, W]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


if __name__ == "__main__":
    log.guarded(main)
