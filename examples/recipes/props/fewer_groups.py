"""Copy a build of the props with a part of its training groups, to see what more groups teach.

The copy keeps every N-th training group in the order of names, and all held-out assets. Bricks and
renders are links to those of the build, so the copy takes no room and trains on the same latents:

    python -m examples.recipes.props.fewer_groups BUILD COPY [N]
    python -m train.dit --preset props --data COPY --latents BUILD/latents --vae VAE --out RUN
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from examples.recipes.props.make_list import page_of
from pipeline.core.cli import command
from pipeline.core.errors import UserError
from pipeline.storage.commit_marker import CommitMarker, describe_files
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path
from pipeline.storage.manifest import read_manifest, write_manifest
from train.data.bricks import built_resolutions

SHAPES = Path(__file__).parent / "shapes.csv"
KEPT_EVERY = 8  # one training group in so many is kept


def groups_of_files(path: Path) -> dict[str, str]:
    """Return the group of each file of a list, by its path in a folder and by its URL.

    Args:
        path: A list with the columns file, repository, commit, path and group.
    """
    groups = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups[row["file"]] = groups[page_of(row)] = row["group"]
    return groups


def copy_build(
    build: Path, copy: Path, groups: Mapping[str, str], every: int = KEPT_EVERY
) -> tuple[int, int]:
    """Write the copy. Assets of the other groups are in no split, so that nothing reads them.

    Args:
        build: A finished build.
        copy: Directory of the copy, which must not exist.
        groups: Group of each file. The files of the build must be among them.
        every: One training group in so many is kept, the first one included.

    Returns:
        Number of groups and of training assets that are kept.

    Raises:
        UserError: If the copy exists, a file has no group, or there is nothing to train on.
    """
    if copy.exists():
        raise UserError(f"copy must not exist, got {copy}; delete it or name another directory")
    if every < 1:
        raise UserError(f"every must be 1 or more, got {every}")
    shards = {path.stem: read_manifest(path) for path in sorted(build.glob("manifest/*.parquet"))}
    training = [row for rows in shards.values() for row in rows if row.split == "train"]
    if not training:
        raise UserError(f"build must have training assets, {build} has none")
    unknown = sorted({row.url for row in training} - groups.keys())
    if unknown:
        raise UserError(f"groups must name every file of the build, {unknown[0]!r} has none")
    kept = set(sorted({groups[row.url] for row in training})[::every])
    copy.mkdir(parents=True)
    for path in build.iterdir():
        if path.name not in ("manifest", "shards", "latents"):
            (copy / path.name).symlink_to(path.resolve())
    count = 0
    for shard, rows in shards.items():
        for marker in (build / "shards" / shard).iterdir():
            link = copy / "shards" / shard / marker.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if marker != marker_path(build, shard, MANIFEST):
                link.symlink_to(marker.resolve())
        left_out = [row.split == "train" and groups[row.url] not in kept for row in rows]
        written = [
            replace(row, split="") if out else row for row, out in zip(rows, left_out, strict=True)
        ]
        count += sum(row.split == "train" for row in written)
        manifest_path(copy, shard).parent.mkdir(exist_ok=True)
        write_manifest(manifest_path(copy, shard), written, built_resolutions(build))
        _commit_manifest(build, copy, shard)
    return len(kept), count


def _commit_manifest(build: Path, copy: Path, shard: str) -> None:
    """Write the commit marker of a manifest of the copy, with the counts of the build's marker."""
    marker = CommitMarker.from_json(marker_path(build, shard, MANIFEST).read_text(encoding="utf-8"))
    files = describe_files(copy, [manifest_path(Path(), shard)])
    marker = replace(marker, files=files, bytes=sum(file.bytes for file in files))
    marker_path(copy, shard, MANIFEST).write_text(marker.to_json(), encoding="utf-8")


def main(args: Sequence[str]) -> None:
    """Copy the build that the arguments name, and print what the copy has.

    Raises:
        UserError: If the arguments are not BUILD COPY [N], besides the errors of `copy_build`.
    """
    if len(args) not in (2, 3) or not all(word.isdecimal() for word in args[2:]):
        raise UserError(f"the arguments must be BUILD COPY [N], got {' '.join(args) or 'none'}")
    every = int(args[2]) if len(args) > 2 else KEPT_EVERY
    groups, assets = copy_build(Path(args[0]), Path(args[1]), groups_of_files(SHAPES), every)
    print(f"{groups} groups with {assets} training assets")


if __name__ == "__main__":
    command(main)
