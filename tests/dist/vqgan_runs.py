"""Started by test_vqgan.py through the deepspeed launcher: many_runs.py, with one process group for all of its runs.

DeepSpeed keeps groups that it made in the first run and cannot use them once the default group was ended and made anew.
"""

import many_runs

from dalle_scale import dist


def main() -> None:
    leave, dist.leave = dist.leave, dist.barrier
    many_runs.main()
    leave()


if __name__ == "__main__":
    main()
