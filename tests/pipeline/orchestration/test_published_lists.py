"""Ranked builds from lists in published layouts, with the catalogues and files on loopback."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from pipeline.curation.config import FilterConfig, RankConfig, ScreenConfig
from pipeline.download.config import FetchConfig
from pipeline.inspection.asset_list import write_attribution
from pipeline.inspection.verification import verify
from pipeline.orchestration.passes import run_passes
from pipeline.orchestration.plan import read_plan
from pipeline.sources.annotations import Annotations
from pipeline.sources.github import GitHub
from pipeline.sources.id_list import listed_columns
from pipeline.sources.objaverse import ObjaverseSource
from pipeline.sources.objaverse_xl import ObjaverseXLSource
from pipeline.sources.procedural import make_shape
from pipeline.sources.shapes import FAMILIES, to_glb
from pipeline.storage.layout import CATALOGUE
from tests.pipeline.builds import config, rows_of
from tests.pipeline.catalogues import (
    COMMIT,
    annotation,
    sha256,
    write_objaverse,
    write_objaverse_xl,
)
from tests.pipeline.faulty_http_server import run_server

pytestmark = pytest.mark.usefixtures("shared_ray")

IDS = [letter * 32 for letter in "abcd"]
SKETCHFAB = "https://sketchfab.com/3d-models"
# Four shapes that pass all thresholds and are no copies of each other.
MESHES = [
    to_glb(make_shape(f"{list(FAMILIES).index(name):04d}-{name}"))
    for name in ("torus_knot", "gear", "vase", "chair")
]


@pytest.fixture
def server():
    with run_server() as server:
        yield server


def fetching(tmp_path):
    return FetchConfig(cache=tmp_path / "cache", backoff_s=0.01, max_wait_s=0.1, retries=1)


def objaverse(tmp_path, server):
    """Objaverse 1.0 with four assets."""
    assets = {
        uid: annotation(
            name=f"Shape {uid[0]}",
            viewerUrl=f"{SKETCHFAB}/shape-{uid}",
            user={"displayName": f"Artist {uid[0]}"},
        )
        for uid in IDS
    }
    client = fetching(tmp_path)
    root = write_objaverse(tmp_path / "annotations", assets)
    for number, (uid, mesh) in enumerate(zip(IDS, MESHES)):
        server.files[f"/hub/glbs/000-{number % 2:03d}/{uid}.glb"] = mesh
    return ObjaverseSource(
        annotations=Annotations(root=root, fetch=client),
        fetch=client,
        hub=f"{server.url}/hub",
        folders=("000-000", "000-001"),
    )


def objaverse_xl(tmp_path, server):
    """Objaverse-XL with two assets of Sketchfab and two of GitHub."""
    client = fetching(tmp_path)
    objaverse(tmp_path, server)
    rows = {
        "github": [
            (blob(server, number), "MIT License", "glb", sha256(MESHES[number]))
            for number in (2, 3)
        ],
        "sketchfab": [
            (f"{SKETCHFAB}/{uid}", "by", "glb", sha256(mesh)) for uid, mesh in zip(IDS[:2], MESHES)
        ],
    }
    for number in (2, 3):
        server.files[f"/raw/ann/meshes/{COMMIT}/{number}.glb"] = MESHES[number]
    return ObjaverseXLSource(
        annotations=Annotations(
            root=write_objaverse_xl(tmp_path / "annotations", rows), fetch=client
        ),
        fetch=client,
        places=tuple(rows),
        hub=f"{server.url}/hub",
        github=GitHub(site=f"{server.url}/site", files=f"{server.url}/raw"),
    )


def blob(server, number):
    return f"{server.url}/site/ann/meshes/blob/{COMMIT}/{number}.glb"


def build_from(tmp_path, ids, source, **rank):
    """Build the listed assets and return their rows of the catalogue by URL."""
    easy = {"min_tokens": 10, "min_contrast": 0.0, "min_coverage": 0.0, "max_leak_fraction": 1.0}
    cfg = config(
        tmp_path / "out",
        source=(source.name,),
        ids=ids,
        rank=RankConfig(target_count=9, **easy, **rank),
        screen=ScreenConfig(resolution=64, image_size=32),
        filter=FilterConfig(licences=("by", "mit")),
    )
    run_passes(cfg, [source])
    write_attribution(cfg.out)
    assert verify(cfg.out) == []
    rows = pq.read_table(cfg.out / CATALOGUE).to_pylist()
    # The columns reach the plans, the manifest and the catalogue alike.
    kept = {row["uid"]: row for row in rows if row["keep"]}
    (records,) = (read_plan(cfg.out).records(shard) for shard in read_plan(cfg.out).shards)
    assert [record.uid for record in records] == list(kept)
    for record, manifest in zip(records, rows_of(cfg.out), strict=True):
        assert manifest.status == "done"
        assert manifest.listed == listed_columns(record.metadata)
        assert {f"listed.{name}" for name in manifest.listed} <= set(rows[0])
    return {row["url"].rpartition("/")[2].removesuffix(".glb"): row for row in rows}


def attribution(tmp_path):
    with (tmp_path / "out/attribution.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["title"]: (row["author"], row["licence"], row["url"])
            for row in csv.DictReader(file)
        }


def test_trellis_500k(tmp_path, server, caplog):
    """A csv of Objaverse-XL with hashes, file identifiers, scores and captions."""
    source = objaverse_xl(tmp_path, server)
    path = tmp_path / "ObjaverseXL_sketchfab.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sha256", "file_identifier", "aesthetic_score", "captions"])
        captions = json.dumps(["A shape, red.", 'A "red" shape.'])
        rows.writerow([sha256(MESHES[0]), f"{SKETCHFAB}/{IDS[0]}", "7.5", captions])
        rows.writerow([sha256(MESHES[1]), f"{SKETCHFAB}/{IDS[1]}", "5.25", ""])
        rows.writerow([sha256(MESHES[2]), blob(server, 2), "6.5", captions])
        rows.writerow(["0" * 64, blob(server, 3), "8", captions])  # the file has changed since
    catalogue = build_from(tmp_path, path, source, min_listed=("aesthetic_score=6",))
    assert {name: row["reason"] for name, row in catalogue.items()} == {
        IDS[0]: "",
        IDS[1]: "low_listed_value",
        "2": "",
    }
    assert "1 of 4 rows are no assets" in caplog.text
    assert catalogue[IDS[0]]["listed.aesthetic_score"] == 7.5
    assert catalogue["2"]["listed.captions"] == captions
    assert attribution(tmp_path) == {
        IDS[0]: ("", "by", f"{SKETCHFAB}/{IDS[0]}"),
        "2.glb": ("", "mit", blob(server, 2)),
    }


def test_step1x_3d(tmp_path, server):
    """A json list of paths in Objaverse 1.0."""
    source = objaverse(tmp_path, server)
    path = tmp_path / "objaverse_320k.json"
    path.write_text(json.dumps([f"000-130/{uid}.glb" for uid in IDS[:2]]), encoding="utf-8")
    catalogue = build_from(tmp_path, path, source)
    assert {name: row["keep"] for name, row in catalogue.items()} == dict.fromkeys(IDS[:2], True)
    assert attribution(tmp_path) == {
        f"Shape {uid[0]}": (f"Artist {uid[0]}", "by", f"{SKETCHFAB}/shape-{uid}") for uid in IDS[:2]
    }


def test_objaverse_plus_plus(tmp_path, server):
    """A json list of objects whose traits are the words true and false."""
    source = objaverse(tmp_path, server)
    path = tmp_path / "annotated_800k.json"
    traits = {"style": "scanned", "is_transparent": "false", "density": "high"}
    annotated = [
        {"UID": uid, "score": score, "is_scene": is_scene, **traits}
        for uid, score, is_scene in zip(IDS[:3], (1, 3, 3), ("false", "false", "true"))
    ]
    path.write_text(json.dumps(annotated), encoding="utf-8")
    catalogue = build_from(
        tmp_path, path, source, weights=("score=100",), max_listed=("is_scene=0",)
    )
    assert {name: (row["rank"], row["reason"]) for name, row in catalogue.items()} == {
        IDS[1]: (0, ""),
        IDS[0]: (1, ""),
        IDS[2]: (-1, "high_listed_value"),
    }
    assert {row["listed.style"] for row in catalogue.values()} == {"scanned"}
    assert [catalogue[uid]["listed.is_scene"] for uid in IDS[:3]] == [0, 0, 1]
