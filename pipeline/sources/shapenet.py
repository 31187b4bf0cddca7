"""ShapeNetCore version 1 or 2, unpacked or in one zip archive per synset."""

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

MODEL_PATHS = ("models/model_normalized.obj", "model.obj")  # version 2, version 1
# The terms of use allow research only, so this is not among the open licences.
SHAPENET_LICENCE = "shapenet"


@dataclass(frozen=True, kw_only=True)
class ShapeNetSource:
    """Every model of ShapeNetCore, ordered by synset and model id. Uids are derived from SYNSET/ID.

    `taxonomy.json` gives the names of the synsets. CSV files with the columns synsetId, modelId and
    split give the split of each model. Records contain both.

    Args:
        root: The directory of ShapeNetCore.
        categories: Synset numbers or names to include. () includes all.
        splits: Names of the splits to include. () includes all.
        archives: Limits of the zip archives.
    """

    root: Path
    categories: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    archives: ArchiveLimits = field(default_factory=ArchiveLimits)
    name = "shapenet"

    def check(self) -> None:
        """Check that the directory holds ShapeNetCore and that the options select a model.

        Raises:
            UserError: If the directory is missing, a category is unknown, there is no split file
                although splits are selected, or nothing is selected.
        """
        if not self.root.is_dir():
            raise UserError(
                f"no folder {self.root}; give the folder of ShapeNetCore's synsets as shapenet:PATH"
            )
        names = self._synset_names()
        known = {*self._synsets(), *(word for words in names.values() for word in words)}
        for category in self.categories:
            if category not in known:
                raise UserError(f"ShapeNetCore in {self.root} has no category {category!r}")
        if self.splits and not self._read_splits():
            raise UserError(f"no split file (*.csv with synsetId, modelId, split) in {self.root}")
        if next(self.records(), None) is None:
            raise UserError(
                f"no SYNSET/ID/{MODEL_PATHS[0]} or SYNSET/ID/{MODEL_PATHS[1]} is selected in "
                f"{self.root}; check the path, categories and splits"
            )

    def records(self) -> Iterator[Record]:
        """Yield one record per selected model.

        Raises:
            UserError: If the taxonomy, a split file or an archive cannot be read.
        """
        names = self._synset_names()
        splits = self._read_splits()
        for synset in self._synsets():
            words = names.get(synset, [])
            if self.categories and not {synset, *words} & set(self.categories):
                continue
            for model, path in self._models(synset):
                split = splits.get(f"{synset}/{model}", "")
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
        """Copy a model with its material and textures to one directory below `scratch`.

        The loader looks for side files in the directory of the model.

        Raises:
            FileNotFoundError: If the model is gone.
            PermissionError: If the model cannot be read.
            Reject: If an archive is damaged or too large.
        """
        archive, _, member = record.url.partition("!/")
        if member:
            folder = scratch / "archive"
            model_folder = "/".join(member.split("/")[:2])
            folder.mkdir()
            extract(self.root / archive, folder, self.archives, below=model_folder)
            model = folder / member
        else:
            model = self.root / record.url
        flat = scratch / "model"
        flat.mkdir()
        for file in _model_files(model):
            shutil.copyfile(file, flat / file.name)
        return flat / model.name

    def _synsets(self) -> list[str]:
        """Return the synset numbers of all directories and archives, sorted."""
        entries = [path for path in self.root.iterdir() if path.suffix == ".zip" or path.is_dir()]
        names = {path.name.removesuffix(".zip") for path in entries}
        return sorted(name for name in names if len(name) == 8 and name.isdecimal())

    def _models(self, synset: str) -> Iterator[tuple[str, str]]:
        """Yield id and path of each model. A directory takes precedence over an archive."""
        folder = self.root / synset
        if folder.is_dir():
            for model in sorted(path.name for path in folder.iterdir()):
                existing = (path for path in MODEL_PATHS if (folder / model / path).is_file())
                path = next(existing, None)
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
            if parts[0] == synset and "/".join(parts[2:]) in MODEL_PATHS:
                yield parts[1], f"{synset}.zip!/{member}"

    def _synset_names(self) -> dict[str, list[str]]:
        """Return the names of each synset, the most common first. {} without a taxonomy."""
        path = self.root / "taxonomy.json"
        if not path.exists():
            return {}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return {
                entry["synsetId"]: [word.strip() for word in entry["name"].split(",")]
                for entry in entries
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not ShapeNet's taxonomy: {error}") from error

    def _read_splits(self) -> dict[str, str]:
        """Return the split of each SYNSET/ID."""
        splits = {}
        for path in sorted(self.root.glob("*.csv")):
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        if {"synsetId", "modelId", "split"} <= row.keys():
                            # Spreadsheets drop the leading zeros of synset numbers.
                            splits[f"{row['synsetId'].zfill(8)}/{row['modelId']}"] = row["split"]
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(
                    f"cannot read {path}: {error}; move it away, or save it as UTF-8"
                ) from error
        return splits


def _model_files(model: Path) -> Iterator[Path]:
    """Yield a model, the files beside it and its images. Links are skipped.

    Version 2 keeps the images one directory above the model.
    """
    folders = [model.parent, model.parent / "images"]
    if model.parent.name == "models":
        folders.append(model.parent.parent / "images")
    with model.open("rb"):  # raises if the model cannot be read
        yield model
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            is_side_file = path != model and path.suffix not in (".obj", ".binvox")
            if is_side_file and path.is_file() and not path.is_symlink():
                yield path
