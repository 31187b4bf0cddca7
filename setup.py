"""Packaging hook: everything else about the distribution stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

# transformers looks up which distribution provides an importable package `kernels`, and takes that
# distribution's version for the version of Hugging Face's library of this name. Without an entry in
# top_level.txt it finds no distribution, imports our package, sees no version and leaves it alone.
NOT_DECLARED = {"kernels"}


class EggInfo(egg_info):
    """Write top_level.txt without packages that other libraries would mistake for their own."""

    def run(self):
        super().run()
        top_level = Path(self.egg_info) / "top_level.txt"
        names = [name for name in top_level.read_text().split() if name not in NOT_DECLARED]
        top_level.write_text("".join(f"{name}\n" for name in names))


setup(cmdclass={"egg_info": EggInfo})
