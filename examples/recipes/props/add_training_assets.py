"""Add assets of further repositories to the training split of the props recipe.

    python -m examples.recipes.props.add_training_assets CLONES FOLDER

The rows of `assets.csv` and `shapes.csv` stay as they are. A new asset that is a copy of a held-out
one is left out, and so is a copy of an asset that is listed already, because it would teach
nothing. FOLDER holds the files of `assets.csv`, see `collect.py`, and receives the new ones.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.recipes.props.make_list import (
    HERE,
    moments_of,
    read_rows,
    with_origins,
    write_rows,
)
from pipeline.core.hashing import sha256_of
from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import Signatures, find_copies

MOST_BYTES = 600_000  # of a file: larger ones are characters with many animations


@dataclass(frozen=True)
class Repository:
    """A repository whose assets are added.

    Args:
        name: The repository, OWNER/NAME.
        root: Directory in it, which is at `folder` in the column file.
        folder: First directory of the column file.
        pattern: Glob pattern of the assets below `root`.
        author: Who made the assets.
        licence: Licence of the assets.
    """

    name: str
    root: str
    folder: str
    pattern: str
    author: str
    licence: str = "CC0-1.0"


# Quaternius dedicates every pack to the public domain in its License.txt. The files of the packs
# as glTF are in the repository of somebody else.
REPOSITORIES = (
    Repository(
        "trebeljahr/quaternius-showcase", "public/glb", "quaternius", "*/*.glb", "Quaternius"
    ),
    Repository(
        "KayKit-Game-Assets/KayKit-Furniture-Bits-1.0",
        "addons/kaykit_furniture_bits/Assets",
        "kaykit-furniture",
        "gltf/*.gltf",
        "KayKit-Game-Assets",
    ),
)


def extract(clone: Path, root: str, folder: Path) -> None:
    """Copy a directory of the newest commit of a clone."""
    words = ["git", "-C", clone, "archive", f"HEAD:{root}"]
    data = subprocess.run(words, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def candidates(folder: Path, repository: Repository) -> list[dict[str, str]]:
    """Return a row for each asset of a repository, without commit, path and shape.

    Args:
        folder: Directory of the files.
        repository: The repository, whose files are in `folder`.
    """
    rows = []
    for path in sorted((folder / repository.folder).glob(repository.pattern)):
        if path.stat().st_size > MOST_BYTES or path.stem.endswith("-transformed"):
            continue  # a transformed file is a compressed copy of another one
        file = path.relative_to(folder)
        rows.append(
            {
                "file": file.as_posix(),
                "repository": repository.name,
                "sha256": sha256_of(path),
                "licence": repository.licence,
                "author": repository.author,
                "group": file.with_suffix("").as_posix(),
                "shape": file.as_posix(),
                "split": "train",
            }
        )
    return rows


def new_shapes(
    listed: Sequence[Mapping[str, str]],
    added: Sequence[Mapping[str, str]],
    moments: NDArray[np.float32],
) -> list[bool]:
    """Return for each added asset whether no listed or earlier added asset has its shape.

    Args:
        listed: Rows of the list.
        added: Rows of the added assets.
        moments: Surface moments of the listed and then the added assets, [N, 34].
    """
    signatures = Signatures(
        sha256=[row["sha256"] for row in (*listed, *added)], visible=moments, faces=moments
    )
    shapes = find_copies(signatures, DedupConfig()).components()
    seen = set(shapes[: len(listed)].tolist())
    is_new = []
    for shape in shapes[len(listed) :].tolist():
        is_new.append(shape not in seen)
        seen.add(shape)
    return is_new


def main(clones: Path, folder: Path) -> None:
    """Append the new assets to `assets.csv` and `shapes.csv`.

    Args:
        clones: Directory of the clones of the repositories, each at OWNER/NAME.
        folder: Directory of the files of `assets.csv`. It receives the new ones.
    """
    names = {repository.name for repository in REPOSITORIES}
    assets, shapes = (
        [row for row in read_rows(HERE / name) if row["repository"] not in names]
        for name in ("assets.csv", "shapes.csv")
    )
    added = []
    for repository in REPOSITORIES:
        target = folder / repository.folder
        target.mkdir(parents=True, exist_ok=True)
        extract(clones / repository.name, repository.root, target)
        added += candidates(folder, repository)
    moments = np.stack([moments_of(folder / row["file"], folder) for row in (*assets, *added)])
    is_new = new_shapes(assets, added, moments)
    rows = with_origins([row for row, new in zip(added, is_new, strict=True) if new], clones)
    for name, listed in (("assets.csv", assets), ("shapes.csv", shapes)):
        write_rows(HERE / name, [*listed, *rows])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
