"""Which code made a build or a checkpoint: format version, package versions, commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1  # of every store, shard and checkpoint; a reader refuses another version

# Version of the mesh readers. It grows whenever some file gives another mesh or another look than
# before. A build keeps the version that it was begun with, so that its products fit together.
READER_VERSION = 3


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Return the versions of Python and of the named packages, and the commit of the code.

    Returns:
        {"versions": {name: version}, "commit": commit}. A version is None if the package is not
        installed. For the commit see `commit_of_code`.
    """
    versions = {"python": platform.python_version(), **{name: _version(name) for name in packages}}
    return {"versions": versions, "commit": commit_of_code()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of_code() -> str | None:
    """Return the git commit of the running code.

    Returns:
        40 hex digits, with "+" appended if files were changed since. None outside a repository, or
        if git cannot be run.
    """
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            encoding="utf-8",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() or None if ended.returncode == 0 else None
