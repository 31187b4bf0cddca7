"""Write the list of the props recipe: its assets, their copies and their split.

The list is committed as `assets.csv` and `shapes.csv`, so this script documents how it was made.
Families are held out, not assets: a family holds whole groups and every copy that deduplication
finds, so that no held-out shape is a training shape in another colour, turn or mirror image. The
commit and the path of each file come from clones of the repositories, by the sha256 of the file.

    python -m examples.recipes.props.make_list INDEX.csv FOLDER CLONES
"""

from __future__ import annotations

import csv
import hashlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.core.hashing import sha256_of
from pipeline.core.schema import Mesh
from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import Signatures, find_copies
from pipeline.curation.shape_moments import surface_moments
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.mesh_io.load import load
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.normalize import normalize
from pipeline.mesh_io.visible_parts import keep_visible
from pipeline.sources.github import Blob, GitHub

HERE = Path(__file__).parent
HELD_OUT_EVERY = 10  # one family in so many is held out
COLUMNS: tuple[str, ...] = (
    *("file", "repository", "commit", "path", "sha256", "licence", "author"),
    *("group", "shape", "split"),
)


def normalized_mesh(path: Path, root: Path) -> Mesh:
    """Return the visible parts of the mesh in a file, normalised."""
    mesh, _ = keep_visible(load(path, LoadConfig(), root=root), WarningLog())
    return normalize(mesh, NormalizeConfig())


def moments_of(path: Path, root: Path) -> NDArray[np.float32]:
    """Return the surface moments of the normalised mesh in a file, float32 [34]."""
    mesh = normalized_mesh(path, root)
    return surface_moments(mesh.vertices[mesh.faces]).astype(np.float32)


def families_of(groups: Sequence[str], shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of each asset's family: chains of the same group or the same shape, [N]."""
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    count, first_group = len(groups), len(groups) + shapes.max() + 1
    rows = np.concatenate([np.arange(count)] * 2)
    columns = np.concatenate([count + shapes, first_group + group])
    nodes = first_group + group.max() + 1
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][:count]


def held_out(names: Sequence[tuple[str, str]]) -> list[bool]:
    """Return whether each family is held out: every tenth, in the order of packs and hashes.

    Args:
        names: Pack and smallest group of each family.
    """

    def key(number: int) -> tuple[str, str]:
        pack, group = names[number]
        return pack, hashlib.sha256(group.encode()).hexdigest()

    chosen = set(sorted(range(len(names)), key=key)[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY])
    return [number in chosen for number in range(len(names))]


def _git(clone: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", clone, *words], capture_output=True, check=True).stdout


def newest_commit(clone: Path) -> str:
    """Return the newest commit of a clone, 40 hex digits."""
    return _git(clone, "rev-parse", "HEAD").decode().strip()


def origins_of(clone: Path, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """Return the newest commit of a clone, and the paths of its files of some names by sha256."""
    commit = newest_commit(clone)
    listed = _git(clone, "ls-tree", "-r", "-z", "--name-only", commit).decode().split("\0")
    paths = [path for path in listed if path.rpartition("/")[2] in names]
    contents = (_git(clone, "cat-file", "blob", f"{commit}:{path}") for path in paths)
    return commit, {
        hashlib.sha256(content).hexdigest(): path
        for path, content in zip(paths, contents, strict=True)
    }


def with_origins(rows: Sequence[dict[str, str]], clones: Path) -> list[dict[str, str]]:
    """Return the rows of a list with the columns commit and path.

    Args:
        rows: Rows with the columns file, repository and sha256.
        clones: Directory of the clones, each at OWNER/NAME.

    Raises:
        ValueError: If a repository does not have a file.
    """
    names = {row["file"].rpartition("/")[2] for row in rows}
    repositories = sorted({row["repository"] for row in rows})
    origins = {name: origins_of(clones / name, names) for name in repositories}
    located = []
    for row in rows:
        commit, paths = origins[row["repository"]]
        if row["sha256"] not in paths:
            raise ValueError(f"{row['file']} must be a file of {row['repository']} at {commit}")
        located.append({**row, "commit": commit, "path": paths[row["sha256"]]})
    return located


def main(index: Path, folder: Path, clones: Path) -> None:
    """Write `assets.csv` and `shapes.csv` beside this script.

    Args:
        index: Table with the columns file, group, pack, repo, licence and sha256.
        folder: Directory of the files.
        clones: Directory of the clones of the repositories, each at OWNER/NAME.
    """
    assets = read_rows(index)
    for asset in assets:
        if sha256_of(folder / asset["file"]) != asset["sha256"]:
            raise ValueError(f"{asset['file']} must have the sha256 {asset['sha256']}")
    moments = np.stack([moments_of(folder / asset["file"], folder) for asset in assets])
    signatures = Signatures(
        sha256=[asset["sha256"] for asset in assets], visible=moments, faces=moments
    )
    shapes = find_copies(signatures, DedupConfig()).components()
    first_of_shape: dict[int, str] = {}
    for asset, shape in zip(assets, shapes, strict=True):
        first_of_shape.setdefault(int(shape), asset["file"])
    families = families_of([asset["group"] for asset in assets], shapes)
    members = defaultdict(list)
    for asset, family in zip(assets, families, strict=True):
        members[int(family)].append(asset)
    names = [
        (members[n][0]["pack"], min(asset["group"] for asset in members[n]))
        for n in range(len(members))
    ]
    is_held_out = held_out(names)
    rows = [
        {
            "file": asset["file"],
            "repository": asset["repo"],
            "sha256": asset["sha256"],
            "licence": asset["licence"],
            "author": asset["repo"].partition("/")[0],
            "group": asset["group"],
            "shape": first_of_shape[int(shape)],
            "split": "val" if is_held_out[int(family)] else "train",
        }
        for asset, shape, family in zip(assets, shapes, families, strict=True)
    ]
    rows = with_origins(rows, clones)
    write_rows(HERE / "assets.csv", rows)
    write_rows(HERE / "shapes.csv", [row for row in rows if row["file"] == row["shape"]])


def page_of(row: Mapping[str, str]) -> str:
    """Return the URL of the file of a row, by which a build of the list names the asset."""
    blob = Blob(repository=row["repository"], commit=row["commit"], path=row["path"])
    return blob.page(GitHub())


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a list."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(
    path: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = COLUMNS
) -> None:
    """Write a list with some columns, COLUMNS if none are given."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
