"""transformers must not take our package `kernels` for Hugging Face's library of the same name.

transformers accepts a library `kernels` if it finds an importable package of that name and a
distribution that provides it, with a version in a certain range. Our distribution is `sparse3d`. It
does not declare the package, so transformers finds no version whatever ours is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.child_python import ROOT, run_python

ASK_TRANSFORMERS = """
import importlib.metadata, pathlib, sys
folder = pathlib.Path(sys.argv[1])
sys.path[:0] = [str(folder), sys.argv[2]]
every_distribution = importlib.metadata.distributions

def distributions(**context):
    # The installed metadata of this checkout may be older than the checkout.
    for distribution in every_distribution(**context):
        if distribution.metadata["Name"] != "sparse3d" or folder in distribution._path.parents:
            yield distribution

importlib.metadata.distributions = distributions
assert importlib.metadata.version("sparse3d") == sys.argv[3]
import kernels
assert pathlib.Path(kernels.__file__).is_relative_to(sys.argv[2])
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available())
"""


def accepted_version() -> str:
    """A version that transformers accepts for Hugging Face's library."""
    from transformers.utils import import_utils

    return import_utils.KERNELS_MIN_VERSION


def is_taken_for_theirs(folder: Path, version: str) -> bool:
    """What transformers says in a process that sees only the metadata in `folder`."""
    result = run_python("-c", ASK_TRANSFORMERS, folder, ROOT, version)
    return {"True": True, "False": False}[result.stdout.split()[-1]]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Path:
    """Folder with the metadata that packaging writes for this checkout."""
    folder = tmp_path_factory.mktemp("metadata")
    run_python("setup.py", "-q", "egg_info", "--egg-base", folder)
    return folder


def set_version(metadata: Path, version: str) -> None:
    info = metadata / "sparse3d.egg-info" / "PKG-INFO"
    lines = info.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("Version: "))
    lines[at] = f"Version: {version}\n"
    info.write_text("".join(lines), encoding="utf-8")


def test_no_version_of_ours_is_taken_for_hugging_faces(metadata):
    version = accepted_version()
    set_version(metadata, version)
    assert not is_taken_for_theirs(metadata, version)
    # With a declaration of the package transformers does take it, so the check above can fail.
    top_level = metadata / "sparse3d.egg-info" / "top_level.txt"
    declared = top_level.read_text(encoding="utf-8")
    top_level.write_text(f"{declared}kernels\n", encoding="utf-8")
    try:
        assert is_taken_for_theirs(metadata, version)
    finally:
        top_level.write_text(declared, encoding="utf-8")


def test_our_package_has_no_version_of_its_own():
    """transformers reads `kernels.__version__` where it finds no distribution."""
    import kernels

    assert not hasattr(kernels, "__version__")


def test_packaging_declares_the_other_packages(metadata):
    declared = (
        (metadata / "sparse3d.egg-info" / "top_level.txt").read_text(encoding="utf-8").split()
    )
    assert declared == ["model", "pipeline", "train"]
    assert importlib.util.find_spec("kernels") is not None
