"""Who may write where: a directory is one build's at a time; a task that fills a URL has folders of its own."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from pipeline.core.errors import RunError, UserError
from pipeline.storage.remote import Location, Remote

log = logging.getLogger(__name__)


@contextmanager
def locked(out: Location) -> Iterator[None]:
    """Inside, no other build writes to the directory `out`, which is made; a place behind a URL is not locked.

    The lock is on the directory itself, so that it leaves no file, and ends with this process however that ends.
    UserError if another build holds it, or there can be no such directory.
    """
    if not isinstance(out, Path):
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = os.open(out, os.O_RDONLY)  # not inherited by the processes that Ray starts
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another build is running with --out {out}; wait for it, or choose another"
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s cannot be locked (%s): start no second build there", out, error.strerror
            )
        yield
    finally:
        os.close(held)


@contextmanager
def workspace(out: Location, scratch: Path | None = None) -> Iterator[Path]:
    """Where a task works for the build at `out`: right there, or in a folder on this node that is removed in the end.

    What tasks that were killed have left is removed as the next one begins. RunError if there can be no folder.
    """
    if isinstance(out, Path):
        yield out
        return
    root = scratch_root(scratch)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(root)
        lock, held = _lock(root)
    except OSError as error:
        raise RunError(
            f"cannot work in {root}: {error.strerror}; choose another --scratch"
        ) from error
    folder = lock.with_suffix("")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(held)


@contextmanager
def fetched(out: Location, parts: Iterable[str | PurePath]) -> Iterator[Path]:
    """The directory of a build; of one at a URL, a copy of these files and folders of it, as far as they are there."""
    with workspace(out) as here:
        if isinstance(out, Remote):
            for part in parts:
                _fetch(out / part, here / part)
        yield here


def _fetch(place: Remote, local: Path) -> None:
    names = place.files()
    if names:
        place.fetch_tree(local, names)
    elif place.exists():
        local.parent.mkdir(parents=True, exist_ok=True)
        place.fetch(local)


@contextmanager
def swept(out: Location, scratch: Path | None) -> Iterator[None]:
    """In the end, nothing is left on this node of tasks that were killed inside."""
    try:
        yield
    finally:
        if not isinstance(out, Path):
            _sweep(scratch_root(scratch))


def scratch_root(scratch: Path | None) -> Path:
    """The folder of this user's workspaces on a node."""
    return (scratch or Path(tempfile.gettempdir())).absolute() / f"sparse3d-{os.getuid()}"


def _lock(root: Path) -> tuple[Path, int]:
    """A file of a new name, locked for as long as this process lives and holds it."""
    while True:
        held, name = tempfile.mkstemp(dir=root, suffix=".lock")
        fcntl.flock(held, fcntl.LOCK_EX)
        if Path(name).exists():  # else it was swept before it was locked
            return Path(name), held
        os.close(held)


def _sweep(root: Path) -> None:
    """Remove the workspaces that no process holds."""
    for lock in root.glob("*.lock"):
        try:
            held = os.open(lock, os.O_RDWR)
        except FileNotFoundError:  # its task has just ended
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(held)
