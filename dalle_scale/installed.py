"""Folders of programs and configs: in the checkout, or bundled with the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent if (_PACKAGE.parent / "launch" / "train.py").is_file() else _PACKAGE / "bundled"
"""Holds launch/, data_tools/ and configs/."""


def programs() -> dict[str, Path]:
    """Name on the command line ("build-shards") -> file of each program, in alphabetical order."""
    files = [path for folder in ("launch", "data_tools") for path in (ROOT / folder).glob("*.py")]
    return {path.stem.replace("_", "-"): path for path in sorted(files, key=lambda path: path.stem)}


def config(name: str) -> Path | None:
    """File of a config that is named by its path, or as it lies in configs/: "tiny/vae" or "configs/tiny/vae.yaml".

    None if there is no such file.
    """
    inside = name.removeprefix("configs/").removesuffix(".yaml")
    places = [Path(name), ROOT / "configs" / f"{inside}.yaml"]
    return next((place for place in places if place.is_file()), None)


def configs() -> list[str]:
    """Names of the shipped configs: "tiny/vae"."""
    root = ROOT / "configs"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
