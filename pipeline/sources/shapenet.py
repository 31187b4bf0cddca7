"""ShapeNetCore, version 1 or 2, in folders or in the archives of its synsets, as its owner has it on disk."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.mesh_io.archive import ArchiveLimits, extract
from pipeline.sources.annotations import to_metadata

MODELS = ("models/model_normalized.obj", "model.obj")  # version 2, version 1
SHAPENET_LICENCE = (
    "shapenet"  # its terms of use: research, not commercial; on no list of open licences
)


@dataclass(frozen=True, kw_only=True)
class ShapeNetSource:
    """Every model below `root`, by synset and id; the key is SYNSET/ID.

    `taxonomy.json` gives the synsets their names, the split files (any *.csv with synsetId, modelId and split) each
    model its split; both are kept in the record and can choose: `categories` by synset or name, `splits` by name.
    """

    root: Path
    categories: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    archives: ArchiveLimits = field(default_factory=ArchiveLimits)
    name = "shapenet"

    def check(self) -> None:
        """UserError if there is no ShapeNetCore at root, a category has no name, or nothing is chosen."""
        if not self.root.is_dir():
            raise UserError(
                f"no folder {self.root}; give the one that holds ShapeNetCore's synsets, shapenet:PATH"
            )
        names = self._names()
        known = {*self._synsets(), *(word for words in names.values() for word in words)}
        for category in self.categories:
            if category not in known:
                raise UserError(f"ShapeNetCore in {self.root} has no category {category!r}")
        if self.splits and not self._split_of():
            raise UserError(f"no split file (*.csv with synsetId, modelId, split) in {self.root}")
        if next(self.records(), None) is None:
            raise UserError(
                f"no SYNSET/ID/{MODELS[0]} and no SYNSET/ID/{MODELS[1]} is chosen in {self.root}"
            )

    def records(self) -> Iterator[Record]:
        names, split_of = self._names(), self._split_of()
        for synset in self._synsets():
            words = names.get(synset, [])
            if self.categories and not {synset, *words} & set(self.categories):
                continue
            for model, path in self._models(synset):
                split = split_of.get(f"{synset}/{model}", "")
                if not self.splits or split in self.splits:
                    yield Record(
                        uid=make_uid(self.name, f"{synset}/{model}"),
                        source=self.name,
                        url=path,
                        licence=SHAPENET_LICENCE,
                        format="obj",
                        metadata=to_metadata(
                            name=words[0] if words else "", categories=[synset, *words], split=split
                        ),
                    )

    def materialize(self, record: Record, scratch: Path) -> Path:
        """A copy below `scratch` with its material and textures beside it, where the loader looks for them.

        FileNotFoundError or PermissionError if it is not there any more; Reject as `extract`.
        """
        archive, _, inside = record.url.partition("!/")
        if inside:
            folder = scratch / "archive"
            home = "/".join(inside.split("/")[:2])
            folder.mkdir()
            extract(self.root / archive, folder, self.archives, below=home)
            model = folder / inside
        else:
            model = self.root / record.url
        flat = scratch / "model"
        flat.mkdir()
        for file in _belongings(model):
            shutil.copyfile(file, flat / file.name)
        return flat / model.name

    def _synsets(self) -> list[str]:
        entries = [path for path in self.root.iterdir() if path.suffix == ".zip" or path.is_dir()]
        found = {path.name.removesuffix(".zip") for path in entries}
        return sorted(name for name in found if len(name) == 8 and name.isdecimal())

    def _models(self, synset: str) -> Iterator[tuple[str, str]]:
        """Id and path of every model of a synset; a folder counts before an archive of the same name."""
        folder = self.root / synset
        if folder.is_dir():
            for model in sorted(path.name for path in folder.iterdir()):
                path = next((path for path in MODELS if (folder / model / path).is_file()), None)
                if path is not None:
                    yield model, f"{synset}/{model}/{path}"
            return
        try:
            with zipfile.ZipFile(self.root / f"{synset}.zip") as archive:
                members = sorted(archive.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {self.root / synset}.zip: {error}") from error
        for member in members:
            parts = member.split("/")
            if parts[0] == synset and "/".join(parts[2:]) in MODELS:
                yield parts[1], f"{synset}.zip!/{member}"

    def _names(self) -> dict[str, list[str]]:
        """Synset -> its names, most common first."""
        path = self.root / "taxonomy.json"
        if not path.exists():
            return {}
        try:
            entries = json.loads(path.read_text())
            return {
                entry["synsetId"]: [word.strip() for word in entry["name"].split(",")]
                for entry in entries
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not ShapeNet's taxonomy: {error}") from error

    def _split_of(self) -> dict[str, str]:
        """SYNSET/ID -> split."""
        splits = {}
        for path in sorted(self.root.glob("*.csv")):
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        if {"synsetId", "modelId", "split"} <= row.keys():
                            splits[f"{row['synsetId'].zfill(8)}/{row['modelId']}"] = row["split"]
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(
                    f"cannot read {path}: {error}; move it away, or save it as UTF-8"
                ) from error
        return splits


def _belongings(model: Path) -> Iterator[Path]:
    """The model, what lies beside it, and its images, which version 2 keeps a folder higher; files alone, no links."""
    folders = [model.parent, model.parent / "images"]
    if model.parent.name == "models":
        folders.append(model.parent.parent / "images")
    with model.open("rb"):
        yield model
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if (
                path.is_file()
                and not path.is_symlink()
                and path != model
                and path.suffix not in (".obj", ".binvox")
            ):
                yield path
