"""Pictures from captions, or from nothing where a model was trained without.

    python launch/sample.py --model runs/demo/dalle/export --prompts "a red circle" --candidates 16 --out runs/mine

Writes <out>/images/<prompt>_<candidate>.png, <out>/samples.jsonl with a row for each picture, <out>/sampling.json that
says how they were drawn, and, when there are few, <out>/grid.png with a row for each prompt. The same model, prompt and
seed give the same pictures, whatever else is drawn beside them. A model without captions (a VAE, a transformer with
text_length 0) takes no prompts; --candidates says how many pictures. --method to --clip are for diffusion models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dalle_scale import dist, log
from dalle_scale.checkpoint import atomic
from dalle_scale.sample import DIFFUSION_OPTIONS, Options, Sampler
from dalle_scale.types import UserError

GRID_SAMPLES, GRID_COLUMNS = 256, 12  # grid.png is drawn up to so many; columns where there is but one prompt


def main() -> None:
    """Open, draw, write."""
    args = parse_args()
    prompts = [*args.prompts, *(read_prompts(args.prompt_file) if args.prompt_file else [])]
    if (args.prime is None) != (args.prime_rows is None):
        raise UserError("--prime and --prime-rows belong together: a picture and how many of its rows to keep")
    sampler = Sampler(args.model, dist.device(), args.text_tokenizer)
    if not prompts and sampler.text:
        raise UserError('no prompts: give --prompts "a caption" or --prompt-file FILE')
    prompts = prompts or [""]
    prime = sampler.prime_codes(args.prime, args.prime_rows) if args.prime else None
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance", *DIFFUSION_OPTIONS)}
    options = Options(prime=prime, size=tuple(args.size) if args.size else None, **given)
    batches = sampler.draw(prompts, args.candidates, args.seed, options, args.batch)
    total = len(prompts) * args.candidates
    pictures = (
        picture
        for batch in batches
        for picture in zip(batch.prompt_index, batch.candidate, batch.seed, batch.images, strict=True)
    )
    images = write(args.out, prompts, log.progress(pictures, "sample", "pictures", total))
    drawn = {"seed": args.seed, "prime_rows": args.prime_rows, "prompts": len(prompts), "candidates": args.candidates}
    atomic.write(args.out / "sampling.json", json.dumps(sampler.record(options) | drawn, indent=1) + "\n")
    if sampler.text and sampler.text.truncated_samples:
        cut, length = sampler.text.truncated_samples, sampler.text_length
        log.say(f"{cut} of {len(prompts)} prompts cut to their first {length} tokens")
    if total <= GRID_SAMPLES:
        columns = args.candidates if len(prompts) > 1 else min(args.candidates, GRID_COLUMNS)
        log.grid(torch.stack(images), columns).save(args.out / "grid.png")
    log.say(f"{total} pictures: {args.out / ('grid.png' if total <= GRID_SAMPLES else 'images')}")


def write(out: Path, prompts: list[str], pictures: Iterator[tuple[int, int, int, Tensor]]) -> list[Tensor]:
    """Save pictures as they come; returns as many as grid.png may show."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    kept: list[Tensor] = []
    with (out / "samples.jsonl").open("w") as rows:
        for index, candidate, seed, image in pictures:
            file = f"images/{index:05d}_{candidate:04d}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / file)
            row = {"prompt_index": index, "prompt": prompts[index], "candidate": candidate, "seed": seed, "file": file}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(kept) < GRID_SAMPLES:
                kept.append(image)
    return kept


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, or of the rows of a .jsonl file, under "prompt"."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the prompts: {error}") from None
    if path.suffix != ".jsonl":
        return lines
    try:
        return [str(json.loads(line)["prompt"]) for line in lines]
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{path}: every line must be a JSON object with a "prompt"') from None


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, action="append", help="export: <run>/export; of vqvae2_prior one a level")
    add("--prompts", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    add("--prompt-file", type=Path, help='captions, one a line, or rows with "prompt" in a .jsonl file')
    add("--out", type=Path, required=True, help="folder to write to")
    add("--candidates", type=int, default=1, help="pictures a prompt")
    add("--seed", type=int, default=0)
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="keep only this many of the likeliest codes; 0 = all")
    add("--top-p", type=float, default=1.0, help="keep the likeliest codes that hold this share; 1 = all")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 = off")
    add("--method", help="of a diffusion model: ancestral, ddim or dpm++; default: the model's, as --steps")
    add("--steps", type=int, help="evaluations of a diffusion model")
    add("--spacing", help="which times: uniform, quadratic or log_snr; default: log_snr for dpm++, else uniform")
    add("--eta", type=float, help="of ddim: share of the ancestral noise, 0 to 1; default: 0")
    add("--variance", help="of ancestral: fixed_large, fixed_small or learned; default: as the model was trained")
    add("--clip", action=argparse.BooleanOptionalAction, help="predicted pictures to [-1, 1]; default: ancestral only")
    add("--size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of codes, for pictures larger than in training")
    add("--batch", type=int, default=256, help="pictures drawn at a time; does not change them")
    add("--prime", type=Path, metavar="IMAGE", help="picture whose top rows of codes are kept")
    add("--prime-rows", type=int, metavar="R", help="how many rows of codes to keep of it")
    add("--text-tokenizer", help="only for an export that does not hold its own")
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
