"""Small catalogues in the layouts of Objaverse, Objaverse-XL and ShapeNetCore."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.procedural import make_shape
from pipeline.sources.shapes import to_glb

COMMIT = "37f4d8d287e201ce52c048bf74d46d6a09d26b2c"
GLB = to_glb(make_shape("0001-torus_knot"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(gzip.compress(json.dumps(value).encode(), mtime=0))


def annotation(**fields: object) -> dict:
    """Return an annotation with the fields of a real one that are used."""
    return {
        "name": "Thing",
        "license": "by",
        "animationCount": 0,
        "isAgeRestricted": False,
        "tags": [],
        **fields,
    }


def write_objaverse(folder: Path, assets: dict[str, dict]) -> Path:
    """Write the annotations of Objaverse 1.0 by id, distributed over two metadata files."""
    ids = sorted(assets)
    place = {uid: f"000-{number % 2:03d}" for number, uid in enumerate(ids)}
    write_json(
        folder / "hf-objaverse-v1/object-paths.json.gz",
        {uid: f"glbs/{place[uid]}/{uid}.glb" for uid in ids},
    )
    for name in ("000-000", "000-001"):
        content = {uid: assets[uid] for uid in reversed(ids) if place[uid] == name}
        write_json(folder / f"hf-objaverse-v1/metadata/{name}.json.gz", content)
    return folder


def write_objaverse_xl(
    folder: Path, rows: dict[str, list[tuple[str, str | None, str, str | None]]]
) -> Path:
    """Write annotations of Objaverse-XL: rows of (fileIdentifier, license, fileType, sha256)."""
    for place in ("github", "thingiverse", "smithsonian", "sketchfab"):
        path = folder / place / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = list(zip(*rows.get(place, []))) or [()] * 4
        names = ("fileIdentifier", "license", "fileType", "sha256")
        table = {name: pa.array(list(column), pa.string()) for name, column in zip(names, columns)}
        other_columns = {
            name: pa.array([text] * len(columns[0]), pa.string())
            for name, text in (("source", place), ("metadata", "{}"))
        }
        pq.write_table(pa.table({**table, **other_columns}), path)
    return folder


def write_shapenet(
    root: Path, version: int, models: dict[str, list[str]], *, zipped: tuple[str, ...] = ()
) -> Path:
    """Write models by synset. Synsets in `zipped` become archives.

    Version 2 keeps the images one directory above the mesh.
    """
    mtl = "newmtl m\nKd 1 1 1\nmap_Kd {}\n"
    obj = "mtllib {}\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\nvt 1 0\nvt 0 1\n"
    obj += "f 1/1 3/2 2/3\nf 1/1 2/2 4/3\nf 1/1 4/2 3/3\nf 2/1 3/2 4/3\n"
    for synset, ids in models.items():
        files: dict[str, bytes] = {}
        for model in ids:
            if version == 2:
                home = f"{synset}/{model}/models"
                files[f"{home}/model_normalized.obj"] = obj.format("model_normalized.mtl").encode()
                files[f"{home}/model_normalized.mtl"] = mtl.format(
                    "../images/texture0.png"
                ).encode()
                files[f"{home}/model_normalized.solid.binvox"] = b"x"
            else:
                home = f"{synset}/{model}"
                files[f"{home}/model.obj"] = obj.format("model.mtl").encode()
                files[f"{home}/model.mtl"] = mtl.format("./images/texture0.png").encode()
            files[f"{synset}/{model}/images/texture0.png"] = png()
        if synset in zipped:
            with zipfile.ZipFile(root / f"{synset}.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
            continue
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def png() -> bytes:
    """Return a PNG image of one red pixel."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0"))
        + chunk(b"IEND", b"")
    )
