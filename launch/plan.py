"""Plan a run on a cluster before anyone rents it: memory, operations, network traffic, time, and what makes it fit.

    python launch/plan.py configs/dalle/paper_12b.yaml --nodes 128 --gpus 8 --memory-gib 16 --flops 125e12 \\
        --intra-gbps 1200 --inter-gbps 100 engine.zero=3

Prints the table; with --out also writes plan.json, plan.md and plan.html. Needs neither a GPU nor the data.
"""

from __future__ import annotations

import argparse

from dalle_scale import config as configs
from dalle_scale import log
from dalle_scale.arguments import Parser, above_zero, at_least, share
from dalle_scale.cluster import plan, plan_page
from dalle_scale.types import UserError


def main() -> None:
    """Check, count, write."""
    args = parse_args()
    cluster = {name: value for name, value in vars(args).items() if name in plan.Cluster.model_fields}
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out: {args.out} is a file; name a folder")
    checked = configs.parse(plan.Cluster, cluster, where="cluster")
    numbers = plan.document(configs.load(args.config, args.overrides), checked)
    log.say(plan_page.markdown(numbers))
    if args.out:
        plan_page.write(args.out, numbers)
        log.say(f"{args.out / 'plan.html'}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. engine.zero=3")
    parser.add_argument("--nodes", type=at_least(1), required=True, help="how many, all alike")
    parser.add_argument("--gpus", type=at_least(1), required=True, help="GPUs in each node; one rank each")
    parser.add_argument("--memory-gib", type=above_zero, required=True, help="memory of each GPU, GiB")
    parser.add_argument("--flops", type=above_zero, required=True, help="matrix rate of each GPU, operations a second")
    parser.add_argument("--intra-gbps", type=above_zero, required=True, help="a GPU to its neighbour, 1e9 bits/s")
    parser.add_argument("--inter-gbps", type=above_zero, required=True, help="out of each node in all, 1e9 bits/s")
    parser.add_argument("--utilisation", type=share, default=0.4, help="share of the matrix rate reached")
    parser.add_out("folder for plan.json, plan.md and plan.html", required=False)
    return parser.parse_args()


if __name__ == "__main__":
    log.guarded(main)
