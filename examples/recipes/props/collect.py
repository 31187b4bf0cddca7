"""Collect the files of the props recipe from clones of their public repositories.

    python -m examples.recipes.props.collect CLONES FOLDER

Repositories of `assets.csv` that CLONES does not hold are cloned from GitHub. Where there is no
network, put a clone, a bare clone or an unpacked archive of each at CLONES/OWNER/NAME. Every file
of the list is found by its SHA-256, wherever it lies in the repository, and copied with its
directory, because glTF files name buffers and textures beside them. Assets of the same formats that
are not listed are left out.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

import tyro

from examples.recipes.props.make_list import HERE, read_rows
from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import sha256_of

log = logging.getLogger(__name__)

PROG = "python -m examples.recipes.props.collect"
SITE = "https://github.com"


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Collect the files of assets.csv from clones of their public repositories."""

    clones: Annotated[Path, tyro.conf.Positional]
    """Directory with a clone of each repository at OWNER/NAME, bare or not. Missing ones are
    cloned."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Directory of the files, at the paths of the list."""


def clone(repository: str, folder: Path, site: str = SITE) -> None:
    """Clone the newest commit of a repository.

    Raises:
        RunError: If git fails.
    """
    log.info("Cloning %s.", repository)
    words = ("git", "clone", "--quiet", "--depth", "1", f"{site}/{repository}", str(folder))
    ended = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        raise RunError(
            f"{repository} cannot be cloned ({last}); put a copy at {folder} and run this again"
        )


@contextmanager
def work_tree(clone_folder: Path) -> Iterator[Path]:
    """Provide the files of a clone.

    Args:
        clone_folder: A clone or an unpacked archive, which has files, or a bare clone, whose newest
            commit is unpacked to a directory that is deleted at the end. Contents that a partial
            clone lacks are left out with a warning.

    Raises:
        RunError: If git cannot read a bare clone.
    """
    if not ((clone_folder / "HEAD").is_file() and (clone_folder / "objects").is_dir()):
        yield clone_folder
        return
    with tempfile.TemporaryDirectory() as folder:
        _unpack(clone_folder, Path(folder))
        yield Path(folder)


def _unpack(bare: Path, folder: Path) -> None:
    """Write the files of the newest commit of a bare clone."""
    git = ("git", "--git-dir", str(bare))
    listed = subprocess.run((*git, "ls-tree", "-rz", "HEAD"), capture_output=True, check=False)
    if listed.returncode:
        cause = listed.stderr.decode(errors="replace").strip()
        raise RunError(f"{bare} cannot be read ({cause})")
    entries = [entry.partition("\t") for entry in listed.stdout.decode().split("\0") if entry]
    files = [
        (head.split()[2], path) for head, _, path in entries if head.startswith("100")
    ]  # not symbolic links and submodules
    missing = []
    with subprocess.Popen(
        (*git, "cat-file", "--batch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for digest, path in files:
            process.stdin.write(f"{digest}\n".encode())
            process.stdin.flush()
            words = process.stdout.readline().split()
            if words[1:] == [b"missing"]:
                missing.append(path)
                continue
            size = int(words[2])
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(process.stdout.read(size + 1)[:size])
    if missing:
        log.warning(
            "%s lacks the contents of %d files, such as %s.", bare, len(missing), missing[0]
        )


def find_root(clone_folder: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Return the directory in a clone that holds the listed files at their paths below the pack.

    Args:
        clone_folder: The clone.
        rows: Listed files of this repository in one directory below a pack.

    Raises:
        UserError: If no directory holds all of them with their hashes.
    """
    inner = [PurePosixPath(row["file"]).relative_to(row["file"].partition("/")[0]) for row in rows]
    best, problem = -1, f"{inner[0]} is nowhere in it"
    for path in sorted(clone_folder.rglob(inner[0].name)):
        if path.parts[-len(inner[0].parts) :] != inner[0].parts:
            continue
        root = path.parents[len(inner[0].parts) - 1]
        wrong = [
            name
            for name, row in zip(inner, rows, strict=True)
            if not (root / name).is_file() or sha256_of(root / name) != row["sha256"]
        ]
        if not wrong:
            return root
        if len(rows) - len(wrong) > best:
            best = len(rows) - len(wrong)
            problem = f"{len(wrong)} files of {root} differ or are missing, such as {wrong[0]}"
    raise UserError(
        f"{clone_folder} must hold the {len(rows)} listed files of its repository, but {problem}; "
        "check out an older commit"
    )


def collect(clones: Path, folder: Path, rows: Sequence[Mapping[str, str]]) -> int:
    """Copy the listed files of all repositories and what lies beside them.

    Args:
        clones: Directory with a clone of each repository at OWNER/NAME. Missing ones are made.
        folder: Directory of the result, whose paths are those of the column file.
        rows: Rows of the list, with the columns file, repository and sha256.

    Returns:
        The number of listed files.

    Raises:
        UserError: If a clone lacks a file with the listed hash.
        RunError: If a repository cannot be cloned.
    """
    # The first directory below a pack holds the files and what they refer to.
    directories = defaultdict(lambda: defaultdict(list))
    for row in rows:
        pack, name = PurePosixPath(row["file"]).parts[:2]
        directories[row["repository"]][pack, name].append(row)
    others = _unlisted(rows)
    for repository, of_repository in directories.items():
        if not (clones / repository).is_dir():
            clone(repository, clones / repository)
        with work_tree(clones / repository) as tree:
            roots = [find_root(tree, listed) for listed in of_repository.values()]
            for root, ((pack, name), listed) in zip(roots, of_repository.items(), strict=True):
                target = folder / pack / name
                shutil.copytree(root / name, target, ignore=others(root, pack), dirs_exist_ok=True)
                log.info("%s: %d listed files of %s.", target, len(listed), repository)
    return len(rows)


def _unlisted(
    rows: Sequence[Mapping[str, str]],
) -> Callable[[Path, str], Callable[[str, list[str]], set[str]]]:
    """Return what tells `shutil.copytree` the assets of a pack that are not listed."""
    listed = {row["file"] for row in rows}
    formats = {PurePosixPath(file).suffix for file in listed}

    def of_pack(root: Path, pack: str) -> Callable[[str, list[str]], set[str]]:
        def ignored(folder: str, names: list[str]) -> set[str]:
            inner = PurePosixPath(pack) / Path(folder).relative_to(root).as_posix()
            assets = (name for name in names if PurePosixPath(name).suffix in formats)
            return {name for name in assets if str(inner / name) not in listed}

        return ignored

    return of_pack


def main(args: Sequence[str]) -> None:
    """Collect the files of assets.csv."""
    cfg = parse(CollectConfig, args, prog=PROG)
    count = collect(cfg.clones, cfg.folder, read_rows(HERE / "assets.csv"))
    log.info("%s holds the %d files of the list.", cfg.folder, count)


if __name__ == "__main__":
    command(main)
