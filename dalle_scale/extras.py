"""Packages that only some programs need: the extras of pyproject.toml that bring them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from dalle_scale import installed
from dalle_scale.types import UserError

_BROUGHT_BY = {  # extra -> packages that it brings
    "train": ("deepspeed", "tensorboard"),
    "data": ("pyarrow", "webdataset", "fsspec", "aiohttp", "yarl", "isal", "py3langid"),
    "eval": ("torch_fidelity",),
    "wandb": ("wandb",),
    "benchmarks": ("matplotlib",),
}


@contextmanager
def named() -> Iterator[None]:
    """Name the extra to install if a package of an extra is missing.

    Raises:
        UserError: in place of such a ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name  # of a module missing in a package that is there, this is the module
        extra = next((extra for extra, packages in _BROUGHT_BY.items() if package in packages), None)
        if extra is None:
            raise
        raise UserError(f"this needs the package {package}: pip install 'dalle_scale[{extra}]'") from None


def name_at_import() -> None:
    """Do as `named` where one of the project's programs is started as a file and imports such a package at its top.

    Programs of others keep their traceback.
    """
    programs = {path.parts[-2:] for path in installed.programs().values()}  # of a checkout or bundled
    if Path(sys.argv[0]).resolve().parts[-2:] in programs:
        sys.excepthook = _one_line


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    try:
        with named():
            raise error
    except UserError as named_error:
        print(f"error: {named_error}", file=sys.stderr)
        sys.exit(2)
    except BaseException:
        sys.__excepthook__(kind, error, trace)
