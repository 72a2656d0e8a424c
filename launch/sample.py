"""Pictures from captions, or from nothing where a model was trained without.

    python launch/sample.py --model runs/demo/dalle/export --prompts "a red circle" --candidates 16 --out runs/mine
    deepspeed --num_gpus 8 launch/sample.py --model runs/demo/dalle/export --prompt-file captions.txt --out runs/mine

Writes <out>/images/<prompt>_<candidate>.png, <out>/samples.jsonl with a row for each picture, <out>/sampling.json that
says how they were drawn, and, when there are few, <out>/grid.png with a row for each prompt. The same model, prompt and
seed give the same pictures, whatever else is drawn beside them and on how many ranks. A model without captions (a VAE,
a transformer with text_length 0) takes no prompts; --candidates says how many pictures. --method to --clip are for
diffusion models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle_scale import dist, log
from dalle_scale import prompts as prompt_files
from dalle_scale.checkpoint import atomic
from dalle_scale.sample import DIFFUSION_OPTIONS, Options, Sampler, candidate_seed
from dalle_scale.types import UserError

GRID_SAMPLES, GRID_COLUMNS = 256, 12  # grid.png is drawn up to so many; columns where there is but one prompt
FILE = "images/{:05d}_{:04d}.png"  # of a prompt and a candidate


def main() -> None:
    """Open, draw, write."""
    args = parse_args()
    prompts = [*args.prompts, *(prompt_files.read(args.prompt_file) if args.prompt_file else [])]
    if (args.prime is None) != (args.prime_rows is None):
        raise UserError("--prime and --prime-rows belong together: a picture and how many of its rows to keep")
    sampler = Sampler(args.model, dist.device(), args.text_tokenizer)
    if not prompts and sampler.text:
        raise UserError('no prompts: give --prompts "a caption" or --prompt-file FILE')
    prompts = prompts or [""]
    prime = sampler.prime_codes(args.prime, args.prime_rows) if args.prime else None
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance", *DIFFUSION_OPTIONS)}
    options = Options(prime=prime, size=tuple(args.size) if args.size else None, **given)
    share = (dist.rank(), dist.world_size())
    batches = sampler.draw(prompts, args.candidates, args.seed, options, args.batch, *share)
    dist.join()
    total = len(prompts) * args.candidates
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    pictures = (p for batch in batches for p in zip(batch.prompt_index, batch.candidate, batch.images, strict=True))
    for index, candidate, image in log.progress(pictures, "sample", "pictures", -(-total // share[1])):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(args.out / FILE.format(index, candidate))
    dist.barrier()
    if dist.is_main():
        write(args, prompts, sampler.record(options))
        if sampler.text and sampler.text.truncated_samples:
            cut, length = sampler.text.truncated_samples, sampler.text_length
            log.say(f"{cut} of {len(prompts)} prompts cut to their first {length} tokens")
        log.say(f"{total} pictures: {args.out / ('grid.png' if total <= GRID_SAMPLES else 'images')}")


def write(args: argparse.Namespace, prompts: list[str], drawn: dict[str, object]) -> None:
    """What belongs to all pictures, once they are there."""
    rows = [
        {
            "prompt_index": index,
            "prompt": prompt,
            "candidate": candidate,
            "seed": candidate_seed(args.seed, prompt, candidate),
            "file": FILE.format(index, candidate),
        }
        for index, prompt in enumerate(prompts)
        for candidate in range(args.candidates)
    ]
    atomic.write(args.out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    drawn |= {"seed": args.seed, "prime_rows": args.prime_rows, "prompts": len(prompts), "candidates": args.candidates}
    atomic.write(args.out / "sampling.json", json.dumps(drawn, indent=1) + "\n")
    if len(rows) <= GRID_SAMPLES:
        images = torch.stack([torch.from_numpy(np.array(Image.open(args.out / str(row["file"])))) for row in rows])
        columns = args.candidates if len(prompts) > 1 else min(args.candidates, GRID_COLUMNS)
        log.grid(images.permute(0, 3, 1, 2), columns).save(args.out / "grid.png")


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
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
