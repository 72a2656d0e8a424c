"""Logs of a run: one console line a cadence with rate and time left, `metrics.jsonl`, TensorBoard, images.

Only rank 0 writes. Also `progress` for every other program and `guarded`, which turns a `UserError` into one line
and exit code 2.
"""

from __future__ import annotations

import errno
import io
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle_scale import dist, extras, rank_log
from dalle_scale.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

extras.name_at_import()  # each program imports this module first
Item = TypeVar("Item")
_REFUSALS = {  # what a user can fix
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip
_PATIENCE_SECONDS = 20  # in which rank 0 finds an error that another rank has found


def say(text: str) -> None:
    """Print one line, on rank 0 only."""
    if dist.is_main():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a bar that shows rate and time left, on rank 0 only."""
    yield from tqdm(items, desc=what, unit=f" {unit}", total=total, disable=not dist.is_main(), mininterval=0.5)


def guarded(main: Callable[[], None]) -> NoReturn:
    """Run a program: an error that a user can fix becomes one line and exit code 2.

    These are `UserError`, a missing package of an extra, and of the operating system a full disk, no permission, or a
    file where a folder should be. The line begins below a progress bar, not on it.

    Before the ranks know each other all of them find the same error, and rank 0 says it; later one rank may be alone.
    An exception because another rank has died becomes one that names that rank (`rank_log`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name or caption that the terminal cannot show
    exit_code = 0
    try:
        with extras.named(), _named_by_the_system():
            main()
        dist.leave()
    except UserError as error:
        _end_bars()
        if dist.is_main():
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            if not dist.is_joined():
                time.sleep(_PATIENCE_SECONDS)  # the launcher ends all ranks with the first; let that be rank 0
            print(f"error on rank {dist.rank()}: {error}", file=sys.stderr, flush=True)
        exit_code = 2
    except Exception:
        _end_bars()
        rank_log.report_failure()
        traceback.print_exc()
        exit_code = 1
    rank_log.close(exit_code)
    sys.exit(exit_code)


@contextmanager
def _named_by_the_system() -> Iterator[None]:
    """Make a UserError of what the operating system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        raise UserError(f"{error.filename or 'a file could not be written'}: {error.strerror}") from error


def _end_bars() -> None:
    """Leave the line of the bars that an error has interrupted."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def grid(batch: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """uint8 images [N, 3, H, W] as one image, `columns` a row, white between."""
    n, _, height, width = batch.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(batch.cpu().permute(0, 2, 3, 1).numpy()):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray(sheet)


class Log:
    """The run's journal in `folder`: `metrics.jsonl`, TensorBoard events, `previews/`."""

    def __init__(self, folder: str | Path, steps: int, wandb_project: str | None = None) -> None:
        self.folder = Path(folder)
        self._bar: tqdm[Any] | None = None
        self._wandb: Any = None
        if not dist.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and other ranks do without

        self._events = SummaryWriter(str(self.folder / "tensorboard"))
        self._metrics = (self.folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._bar = tqdm(total=steps, unit=" steps", desc=self.folder.name, mininterval=0.5, dynamic_ncols=True)
        if wandb_project:
            self._wandb = _open_wandb(wandb_project, self.folder)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of one step: a line of metrics.jsonl, TensorBoard, and the bar."""
        if self._bar is None:
            return
        self._metrics.write(json.dumps({"step": step, "time_seconds": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        shown = {name.removeprefix("train/"): f"{value:.4g}" for name, value in list(values.items())[:4]}
        self._bar.set_postfix(shown, refresh=False)

    def images(self, step: int, images: dict[str, Tensor]) -> None:
        """Save each uint8 [N, 3, H, W] as `previews/<name>_<step>.png` and to TensorBoard."""
        if self._bar is None:
            return
        (self.folder / "previews").mkdir(exist_ok=True)
        for name, batch in images.items():
            sheet = grid(batch, columns=8)
            sheet.save(self.folder / "previews" / f"{name}_{step:07d}.png")
            self._events.add_image(name, np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
            self._events.close()
            self._metrics.close()
        if self._wandb:
            self._wandb.finish()


def _open_wandb(project: str, folder: Path) -> Any:
    """Start a Weights & Biases run."""
    import wandb  # of an extra

    return wandb.init(project=project, dir=str(folder), name=folder.name)
