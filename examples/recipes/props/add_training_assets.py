"""Add assets of further repositories to the training split of the props recipe.

    python -m examples.recipes.props.add_training_assets CLONES FOLDER

The other rows of `assets.csv` and `shapes.csv` stay as they are. A new asset that is a copy or
nearly a copy of a held-out one is left out, and so is one of an asset that is listed already,
because it would teach nothing. Flat assets are no props. FOLDER holds the files of `assets.csv`,
see `collect.py`, and receives the new ones.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from examples.recipes.props.make_list import (
    HERE,
    moments_of,
    newest_commit,
    normalized_mesh,
    read_rows,
    write_rows,
)
from pipeline.core.hashing import sha256_of
from pipeline.curation.config import DedupConfig
from pipeline.curation.dedup import Signatures, find_copies

MOST_BYTES = 600_000  # of a file: larger ones are characters with many animations
LEAST_THICKNESS = 0.015  # shortest side, relative to the longest: thinner ones are tiles and decals
# Pairs up to this difference of their moments were one model in two versions, or in two precisions.
NEAR_COPIES = DedupConfig(shape_tolerance=2e-3)


@dataclass(frozen=True)
class Repository:
    """A directory of a repository whose assets are added.

    Args:
        name: The repository, OWNER/NAME.
        root: Directory in it, which is at `folder` in the column file.
        folder: First directory of the column file.
        pattern: Glob pattern of the assets below `root`.
        author: Who made the assets.
        leave_out: Glob patterns of the names, without directory and ending, of assets that are
            left out because they are no props: tiles, letters and the like.
        copies: How similar an asset that is left out is to another one.
        licence: Licence of the assets.
    """

    name: str
    root: str
    folder: str
    pattern: str
    author: str
    leave_out: tuple[str, ...] = ()
    copies: DedupConfig = NEAR_COPIES
    licence: str = "CC0-1.0"


MAP_EDITOR = "binhbb2204/map-editor"
CROSSING = "AkiraNim/CLTCrossing"
HORDE = "ruiguitos/horde-breaker"
CLASS = "image-campus-2025-trayecto-godot/clase-21"
FUN = "zeynepgenc1311-cell/FunForeverGitHub"
FREE = "beep2bleep/FreeAssetsByKenneyNLandQuaternius"
KAYKIT, TINY_TREATS = "KayKit-Game-Assets", "TinyTreats-Game-Assets"
ROADS = ("road-*", "road")
RAILS = ("railroad-*", "spline-*", "track*", "RailwayTrack*")
SIGNS = ("indicator-*", "arrow*", "number-*", "letter-*")
GOLF_COURSE = (
    *("block*", "bump*", "corner", "crest", "end", "gap", "hill-*", "hole-*", "inner-corner"),
    *("narrow-*", "open", "ramp*", "round-*", "side", "skew-*", "spline-*", "split*", "square-*"),
    *("start", "straight", "support*", "tunnel-*", "wall*"),
)
FLOORS = ("floor*", "Street_*", "path-*", "driveway-*", "*_blanket_?*", "*cobble*stones*")

# Kenney, Kay Lousberg (KayKit), Isa Lousberg (Tiny Treats) and Quaternius dedicate their packs to
# the public domain. Many are in repositories of others, of which only packs are taken whose
# dedication by their author is in the same repository: a License.txt beside or above the pack.
_KENNEY = (
    (MAP_EDITOR, "public/models/kenney_nature-kit/Models", "kenney-nature", "GLTF format/*.glb"),
    (
        MAP_EDITOR,
        "public/models/kenney_fantasy-town-kit_2.0/Models",
        "kenney-fantasy-town",
        "GLB format/*.glb",
    ),
    (MAP_EDITOR, "public/models/kenney_survival-kit/Models", "kenney-survival", "GLB format/*.glb"),
    (CROSSING, "CltCrossing/assets/assets/furniture-kit", "kenney-furniture", "Models/*.glb"),
    *(
        (
            "wndzlf/TapTapCho",
            f"static/vendor/kenney_{kit}-kit/Models",
            f"kenney-{kit}",
            "GLB format/*.glb",
        )
        for kit in ("retro-urban", "car")
    ),
    (CLASS, "assets/kenney_blaster-kit_2.1/Models", "kenney-blaster", "GLB format/*.glb"),
    (CLASS, "assets/kenney_mini-dungeon/Models", "kenney-mini-dungeon", "GLB format/*.glb"),
    *(
        (HORDE, "assets/models", "kenney", f"kenney_{kit}/*.glb")
        for kit in (
            *("factory_kit", "graveyard_kit", "city_commercial", "city_industrial"),
            "mini_forest",
        )
    ),
    (
        "boatrocl/Project-Game-3D",
        "assets/kenney_minigolf-kit/Models",
        "kenney-minigolf",
        "GLB format/*.glb",
    ),
    (
        "KenneyNL/Starter-Kit-Basic-Scene",
        "sample/Mini Arena/Models",
        "kenney-mini-arena",
        "GLB format/*.glb",
    ),
    ("KenneyNL/Starter-Kit-Racing", "", "kenney-racing", "models/*.glb"),
)
# Directory of the pack below "FreeModels by Quaternius[Patreon]", and its directory in the list.
_QUATERNIUS = {
    "Characters and Animals/Animal Pack Vol.2 - Jul 2017": "animals",
    "Characters and Animals/Posed Background Characters - Aug 2018/Female/Female Poses": "women",
    "Characters and Animals/Posed Background Characters - Aug 2018/Male/Male Poses": "men",
    "FPS/Sci-Fi Guns - May 2018": "sci-fi-guns",
    "Home and Buildings/Buildings Pack - Jan 2019": "buildings-2019",
    "Home and Buildings/Buildings pack - Aug 2017": "buildings-2017",
    "Home and Buildings/Civilization Buildings - May 2018": "civilizations",
    "Home and Buildings/Farm Buildings - Sept 2018": "farm",
    "Home and Buildings/Furniture Pack - March 2019": "furniture-2019",
    "Home and Buildings/Furniture Pack - Oct 2017": "furniture-2017",
    "Medieval/Medieval Weapons Pack - Sept 2018": "weapons",
    "Medieval/Pirate Pack - Oct 2016": "pirates",
    "Medieval/RPG Asset Pack - May 2017": "rpg",
    "Medieval/Updated Modular Dungeon - May 2019": "dungeon",
    "Miscellaneous/Holiday pack - Nov 2016": "holidays",
    "Miscellaneous/Junk Food Pack - Apr 2017": "junk-food",
    "Nature/.Textured Fantasy Nature - Mar 2017": "fantasy-nature",
    "Space/Spaceship Pack - Jan 2018": "spaceships",
    "Vehicles/Airplane pack - Jan 2017": "airplanes",
    "Vehicles/Basic Car Pack - Jan 2017": "basic-cars",
    "Vehicles/Public Transport Pack - Feb 2017": "public-transport",
    "Vehicles/Realistic Car Pack - Nov 2018": "realistic-cars",
    "Vehicles/Ship pack - Feb 2018": "ships",
    "Vehicles/Train Pack - April 2019": "trains",
}
REPOSITORIES = (
    Repository(
        "trebeljahr/quaternius-showcase",
        "public/glb",
        "quaternius",
        "*/*.glb",
        "Quaternius",
        copies=DedupConfig(),
    ),
    Repository(
        f"{KAYKIT}/KayKit-Furniture-Bits-1.0",
        "addons/kaykit_furniture_bits/Assets",
        "kaykit-furniture",
        "gltf/*.gltf",
        KAYKIT,
        copies=DedupConfig(),
    ),
    *(
        Repository(
            *pack,
            "Kenney",
            leave_out=(
                *(*ROADS, *RAILS, *SIGNS, *FLOORS, "ground_*"),
                *(GOLF_COURSE if pack[2] == "kenney-minigolf" else ()),
            ),
        )
        for pack in _KENNEY
    ),
    *(
        Repository(FUN, f"Assets/{pack}_1.0_FREE/Assets", folder, "gltf/*.gltf", author, FLOORS)
        for pack, folder, author in (
            ("KayKit_Forest_Nature_Pack", "kaykit-forest", KAYKIT),
            ("KayKit_BlockBits", "kaykit-blocks", KAYKIT),
            ("Tiny_Treats_Fun_Playground", "tinytreats-playground", TINY_TREATS),
        )
    ),
    *(
        Repository(
            f"{TINY_TREATS}/Tiny-Treats-{pack}-1.0",
            f"addons/tiny_treats_{pack.lower().replace('-', '_')}_set/Assets",
            f"tinytreats-{pack.lower()}",
            "gltf/*.gltf",
            TINY_TREATS,
            FLOORS,
        )
        for pack in (
            *("Baked-Goods", "Bubbly-Bathroom", "Charming-Kitchen", "Homely-House"),
            *("Pleasant-Picnic", "Pretty-Park"),
        )
    ),
    Repository(
        HORDE,
        "assets/models",
        "quaternius-zombies",
        "quaternius_zombie_apocalypse/environment/*.gltf",
        "Quaternius",
        FLOORS,
    ),
    *(
        Repository(
            FREE,
            f"FreeModels by Quaternius[Patreon]/{directory}",
            f"quaternius-{folder}",
            "FBX/*.fbx",
            "Quaternius",
            ("*_Hairstyle_*", "Terrain*", "Modular*", *RAILS),
        )
        for directory, folder in _QUATERNIUS.items()
    ),
)


def extract(clone: Path, repository: Repository, folder: Path) -> None:
    """Copy the first directory of a pattern from the newest commit of a clone."""
    words = ["git", "-C", clone, "archive", f"HEAD:{repository.root}"]
    first = repository.pattern.partition("/")[0]
    if "*" not in first:
        words.append(first)
    data = subprocess.run(words, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")


def candidates(folder: Path, repository: Repository, commit: str) -> list[dict[str, str]]:
    """Return a row for each asset of a repository.

    Args:
        folder: Directory of the files.
        repository: The repository, whose files are in `folder`.
        commit: Its commit.
    """
    rows = []
    for path in sorted((folder / repository.folder).glob(repository.pattern)):
        if path.stat().st_size > MOST_BYTES or path.stem.endswith("-transformed"):
            continue  # a transformed file is a compressed copy of another one
        if any(fnmatchcase(path.stem, pattern) for pattern in repository.leave_out):
            continue
        file = path.relative_to(folder)
        inner = file.relative_to(repository.folder)
        rows.append(
            {
                "file": file.as_posix(),
                "repository": repository.name,
                "commit": commit,
                "path": (PurePosixPath(repository.root) / inner).as_posix(),
                "sha256": sha256_of(path),
                "licence": repository.licence,
                "author": repository.author,
                "group": file.with_suffix("").as_posix(),
                "shape": file.as_posix(),
                "split": "train",
            }
        )
    return rows


def thickness(path: Path, root: Path) -> float:
    """Return the shortest side of the bounding box of a mesh, relative to the longest."""
    sides = np.ptp(normalized_mesh(path, root).vertices, axis=0)
    return float(sides.min() / sides.max())


def new_shapes(
    listed: Sequence[Mapping[str, str]],
    added: Sequence[Mapping[str, str]],
    moments: NDArray[np.float32],
    cfg: DedupConfig = NEAR_COPIES,
) -> list[bool]:
    """Return for each added asset whether no listed or earlier added asset has its shape.

    Args:
        listed: Rows of the list.
        added: Rows of the added assets.
        moments: Surface moments of the listed and then the added assets, [N, 34].
        cfg: How similar copies are.
    """
    signatures = Signatures(
        sha256=[row["sha256"] for row in (*listed, *added)], visible=moments, faces=moments
    )
    shapes = find_copies(signatures, cfg).components()
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
    listed = list(assets)
    moments = [moments_of(folder / row["file"], folder) for row in listed]
    for copies, repositories in groupby(REPOSITORIES, key=lambda repository: repository.copies):
        added = []
        for repository in repositories:
            target = folder / repository.folder
            target.mkdir(parents=True, exist_ok=True)
            clone = clones / repository.name
            extract(clone, repository, target)
            added += candidates(folder, repository, newest_commit(clone))
        if copies == NEAR_COPIES:
            added = [
                row for row in added if thickness(folder / row["file"], folder) >= LEAST_THICKNESS
            ]
        moments += [moments_of(folder / row["file"], folder) for row in added]
        is_new = new_shapes(listed, added, np.stack(moments), copies)
        new = [row for row, is_new_one in zip(added, is_new, strict=True) if is_new_one]
        kept = [True] * len(listed) + is_new
        moments = [values for values, keep in zip(moments, kept, strict=True) if keep]
        listed += new
    rows = listed[len(assets) :]
    for name, old in (("assets.csv", assets), ("shapes.csv", shapes)):
        write_rows(HERE / name, [*old, *rows])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
