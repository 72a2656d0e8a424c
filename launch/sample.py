"""Sample images from captions, or from nothing where a model was trained without.

    python launch/sample.py --model runs/demo/dalle/export --prompts "a red circle" --candidates 16 --out runs/mine
    deepspeed --num_gpus 8 launch/sample.py --model runs/demo/dalle/export --prompt-file captions.txt --out runs/mine
    python launch/sample.py --model runs/demo/dalle/export --prompts "a red circle" --candidates 512 \\
        --clip runs/demo/clip/export --keep 8 --out runs/mine temperature=0.9 top_k=100
    python launch/sample.py --list-options runs/demo/dalle/export

Writes <out>/sampling.json, the record of models and options; <out>/images/<prompt>_<candidate>.png; and when all are
there <out>/samples.jsonl, a row an image, and for few images <out>/grid.png, a row a prompt. An image depends on model,
prompt and seed only. The same command resumes, and adds images for more --candidates. --clip scores each batch while
the next is sampled, and writes the output of launch/rerank.py to <out>/reranked. A model without captions takes no
prompts. Options of sampling follow as key=value; each model has its own, which --list-options prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dalle_scale import config as configs
from dalle_scale import dist, log
from dalle_scale.arguments import Parser, at_least
from dalle_scale.sampling import prompts as prompt_files
from dalle_scale.sampling import rerank, rerank_page, runner
from dalle_scale.sampling.output_folder import Store, fingerprint
from dalle_scale.sampling.sampler import DTYPES, Sampler, list_options
from dalle_scale.types import UserError


def main() -> None:
    """Open, sample what is missing, write."""
    args = parse_args()
    check(args)
    prompts = [*args.prompts, *(prompt_files.read(args.prompt_file) if args.prompt_file else [])]
    sampler = Sampler(args.model, dist.device(), args.text_tokenizer, args.dtype)
    if not prompts and sampler.text:
        raise UserError('no prompts: give --prompts "a caption" or --prompt-file FILE')
    prompts = prompts or [""]
    prime = sampler.prime_codes(args.prime, args.prime_rows) if args.prime else None
    options, primed = configs.parse_options(sampler.sampler.Options, args.options), bool(args.prime)
    sampler.check(prompts, args.candidates, options, primed)
    store, how = Store(args.out, prompts, args.candidates, args.seed), {}
    if dist.is_main():  # it alone reads all weights once more
        how = sampler.record(options, primed) | store.record() | {"prime_rows": args.prime_rows}
        how |= {"prime": fingerprint(args.prime), "text_tokenizer": fingerprint(args.text_tokenizer)}
        store.check(how)
    scores = runner.Scores(rerank.open_scorer(args.clip, dist.device()), store) if args.clip else None
    dist.join()
    missing = store.begin(how)
    if len(missing) < len(store.places):
        log.say(f"{len(store.places) - len(missing)} of {len(store.places)} images are there; samples the rest")
    runner.sample(sampler, options, store, missing, scores, args.batch_size, prime)
    found = scores.collected() if scores else None
    dist.barrier()
    if dist.is_main():
        lines = [f"{len(store.places)} images: {store.finish()}"]
        if sampler.text and sampler.text.truncated_samples:
            cut, length = sampler.text.truncated_samples, sampler.text_length
            lines.insert(0, f"{cut} of {len(prompts)} prompts cut to their first {length} tokens")
        if found is not None:
            ranked = rerank.keep(rerank.rank(store.rows(), found), args.keep or 1)
            lines += rerank_page.save(args.out / "reranked", rerank_page.Ranking(args.out, ranked, args.clip))
        log.say("\n".join(lines))


def check(args: argparse.Namespace) -> None:
    """Check the options before the model is opened."""
    if (args.prime is None) != (args.prime_rows is None):
        raise UserError("--prime and --prime-rows belong together: an image and how many of its rows to keep")
    if args.keep is not None and not args.clip:
        raise UserError(f"--keep: {args.keep}, but nothing ranks the candidates; name a CLIP with --clip")
    if args.keep is not None and not 1 <= args.keep <= args.candidates:
        raise UserError(f"--keep: {args.keep}, but a prompt has {args.candidates} candidates; keep 1 to all of them")
    if args.clip:
        rerank_page.check_folder(args.out / "reranked")


class ListOptions(argparse.Action):
    """Ends the program as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: Any, option: str | None = None) -> None:
        log.say(list_options([Path(value) for value in values]))
        parser.exit()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("options", nargs="*", metavar="key=value", help="of sampling; see --list-options")
    add("--model", type=Path, required=True, action="append", help="export: <run>/export; of vqvae2_prior one a level")
    add("--list-options", action=ListOptions, nargs="+", metavar="EXPORT", help="print sampling options, and stop")
    add("--prompts", action="append", default=[], metavar="TEXT", help="a caption; may be repeated")
    add("--prompt-file", type=Path, help='captions, one a line, or rows with "prompt" in a .jsonl file')
    parser.add_out()
    add("--candidates", type=at_least(1), default=1, help="images a prompt")
    parser.add_seed()
    parser.add_batch_size("images sampled at a time, does not change them; default: as many as memory takes")
    parser.add_device()
    add("--dtype", choices=DTYPES, help="of a transformer's matrices; default: bf16 on a GPU, else fp32")
    add("--prime", type=Path, metavar="IMAGE", help="image whose top rows of codes are kept")
    add("--prime-rows", type=int, metavar="R", help="how many rows of codes to keep of it")
    parser.add_clip("score and rank as launch/rerank.py --clip, into <out>/reranked")
    add("--keep", type=int, help="of --clip: best candidates a prompt to copy and show (default 1)")
    add("--text-tokenizer", help="only for an export that does not hold its own")
    parser.add_local_rank()
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
