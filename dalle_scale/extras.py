"""Packages that only some programs need: the extras of pyproject.toml that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in _BROUGHT_BY.items() if package in packages), None)
        if extra is None:
            raise
        raise UserError(f"this needs the package {package}: pip install 'dalle_scale[{extra}]'") from None
