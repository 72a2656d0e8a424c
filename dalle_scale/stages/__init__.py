"""The trainable systems, one file each. The file name is the registry: `stage: dvae` is `stages/dvae.py`.

A dotted name (`stage: my_package.my_stage`) is any importable module that defines a class `Stage`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from dalle_scale.types import Stage, UserError


def names() -> list[str]:
    """Every stage there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def resolve(name: str) -> type[Stage]:
    """The `Stage` class of `stages/<name>.py`, or of the importable module with this dotted name.

    Raises:
        UserError: no such file or module.
    """
    if "." not in name and name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names())}"
        raise UserError(f"stage: unknown stage '{name}'; {hint}")
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise  # the module is there, something that it imports is not
        raise UserError(f"stage: no module '{name}' on the Python path ({error})") from None
    found = getattr(module, "Stage", None)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise UserError(f"stage: module '{name}' defines no class Stage derived from dalle_scale.types.Stage")
    return found
