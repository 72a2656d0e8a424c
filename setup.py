"""Bundle programs and configs into wheels, below dalle_scale/bundled. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = ("launch", "data_tools", "configs")


class WithPrograms(build_py):
    """Copies the folders of programs and configs beside the modules, unless the checkout itself is installed."""

    def run(self) -> None:
        super().run()
        for folder in () if self.editable_mode else BUNDLED:
            target = Path(self.build_lib, "dalle_scale", "bundled", folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": WithPrograms})
