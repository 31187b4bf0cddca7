"""Builds from a hostile server and folder: every asset has a row, nothing else changes."""

import gzip
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from pipeline.core.hashing import make_uid
from pipeline.curation.config import FilterConfig
from pipeline.download.config import FetchConfig
from pipeline.inspection.verification import verify
from pipeline.orchestration.plan import make_plan
from pipeline.sources import open_source
from pipeline.sources.annotations import Annotations
from pipeline.sources.objaverse import ObjaverseSource
from pipeline.sources.objaverse_xl import ObjaverseXLSource
from tests.pipeline.archive_files import make_tar, make_zip
from tests.pipeline.builds import assert_same, build, config, contents, rows_of
from tests.pipeline.catalogues import (
    GLB,
    annotation,
    sha256,
    write_objaverse,
    write_objaverse_xl,
)
from tests.pipeline.crashing_source import box
from tests.pipeline.faulty_http_server import run_server

pytestmark = pytest.mark.usefixtures("shared_ray")

DONE = ("done", "", "")
MAX_FACES = 2_000
CORNERS = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
TETRAHEDRON = CORNERS[[[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]]


def stl(triangles: np.ndarray) -> bytes:
    record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("extra", "<u2")])
    rows = np.zeros(len(triangles), record)
    rows["corners"] = triangles
    return bytes(80) + struct.pack("<I", len(triangles)) + rows.tobytes()


# The uids, and with them the cameras, depend on the server's port. The shape must not look flat
# from any side.
STL = stl(trimesh.creation.icosahedron().triangles)


def ends(out: Path) -> dict[str, tuple[str, str, str]]:
    return {row.url: (row.status, row.stage, row.reason) for row in rows_of(out)}


def test_a_server_that_misbehaves_and_the_run_goes_on(tmp_path):
    """Assets whose server fault passes are done. The others are recorded with their reason."""
    faults = {
        "well": ([], DONE),
        "reset": (["reset", "reset 50", "reset 70"], DONE),
        "busy": (["status 429 1"], DONE),
        "errors": (["status 500", "status 503"], DONE),
        "stall": (["stall 9"], DONE),
        "truncated": (["truncate 60", "truncate 60"], DONE),
        "range-ignored": (["reset 50", "ignore_range"], DONE),
        "redirected": (["redirect /well.stl"], DONE),
        "later": (["status 500"] * 4, DONE),  # the client gives up once, the run does not
        "never": (["status 500", "always"], ("failed", "fetch", "http_500")),
        "gone": (["status 404"], ("rejected", "fetch", "http_404")),
        "loop": (["redirect /loop.stl", "always"], ("rejected", "fetch", "too_many_redirects")),
        "page": (["html"], ("rejected", "fetch", "wrong_sha256")),
        "page-unhashed": (["html"], ("rejected", "fetch", "wrong_magic")),
        "other": ([], ("rejected", "fetch", "wrong_sha256")),
        "closed": ([], ("rejected", "metadata", "licence")),
        "blend": ([], ("rejected", "metadata", "missing_blender")),
    }
    with run_server() as server:
        server.files |= {f"/{name}.stl": STL for name in faults}
        server.scripts |= {f"/{name}.stl": script for name, (script, _) in faults.items()}
        unlike = {"page-unhashed": None, "other": "0" * 64}
        licences, kinds = {"closed": "by-nc"}, {"blend": "blend"}
        rows = [
            (
                f"{server.url}/{n}.stl",
                licences.get(n, "by"),
                kinds.get(n, "stl"),
                unlike.get(n, sha256(STL)),
            )
            for n in faults
        ]
        root = write_objaverse_xl(tmp_path / "xl", {"smithsonian": rows})
        client = FetchConfig(
            cache=tmp_path / "cache", retries=3, backoff_s=0.01, max_wait_s=1.0, read_timeout_s=1.0
        )
        source = ObjaverseXLSource(
            annotations=Annotations(root=root), fetch=client, places=("smithsonian",)
        )
        limits = {"retries": 1, "retry_wait_s": 0.2, "max_failed_share": 1.0}
        cfg = config(tmp_path / "out", limits=limits, source=("objaverse-xl",))
        total = build(cfg, [source])
        assert ends(cfg.out) == {
            f"{server.url}/{name}.stl": end for name, (_, end) in faults.items()
        }
        assert verify(cfg.out) == []
        assert total == {"done": 9, "rejected": 7, "failed": 1}
        assert (
            server.visit_counts.get("/closed.stl", 0)
            == server.visit_counts.get("/blend.stl", 0)
            == 0
        )
        # What a calm server would have given: the faults leave no trace in what is built.
        server.scripts = {
            f"/{name}.stl": script for name, (script, end) in faults.items() if end != DONE
        }
        server.visit_counts.clear()
        calm = config(tmp_path / "calm", limits=limits, source=("objaverse-xl",))
        build(calm, [replace(source, fetch=replace(client, cache=tmp_path / "other"))])
        assert_same(contents(calm.out), contents(cfg.out))
    assert not list((tmp_path / "cache/partial").rglob("*.lock"))


def test_objaverse_from_its_annotations_to_shards(tmp_path):
    with run_server() as server:
        ids = {letter: letter * 32 for letter in "abcd"}
        said = {
            "a": annotation(),
            "b": annotation(isAgeRestricted=True),
            "c": annotation(license="by-nc"),
            "d": annotation(name="an hdri"),
        }
        root = write_objaverse(
            tmp_path / "annotations", {ids[letter]: entry for letter, entry in said.items()}
        )
        server.files[f"/glbs/000-000/{ids['a']}.glb"] = GLB
        client = FetchConfig(cache=tmp_path / "cache")
        folders = ("000-000", "000-001")
        source = ObjaverseSource(
            annotations=Annotations(root=root), fetch=client, hub=server.url, folders=folders
        )
        cfg = config(tmp_path / "out", source=("objaverse",))
        assert build(cfg, [source]) == {"done": 1, "rejected": 3, "failed": 0}
        found = {row.uid: row.reason for row in rows_of(cfg.out)}
        reasons = {"a": "", "b": "age_restricted", "c": "licence", "d": "banned_word"}
        assert found == {
            make_uid("objaverse", ids[letter]): reason for letter, reason in reasons.items()
        }
        assert len(server.requests) == 1


def gltf(uri: str) -> str:
    """A tetrahedron whose buffer is elsewhere."""
    return json.dumps(
        {
            "asset": {"version": "2.0"},
            "scenes": [{"nodes": [0]}],
            "scene": 0,
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
            "accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 12}],
            "bufferViews": [{"buffer": 0, "byteLength": 144}],
            "buffers": [{"uri": uri, "byteLength": 144}],
        }
    )


def fill(folder: Path, secret: Path) -> dict[str, tuple[str, str, str]]:
    """Files that have gone wrong or were made to do harm, and how each must end."""
    (folder / "in").mkdir()
    (folder / "in/good.bin").write_bytes(TETRAHEDRON.tobytes())
    secret.write_bytes(TETRAHEDRON.tobytes())
    secret.with_name("secret.usda").write_text(
        '#usda 1.0\n(\n    defaultPrim = "c"\n)\ndef Cube "c" {\n}\n', encoding="utf-8"
    )
    soup = np.random.default_rng(0).normal(size=(MAX_FACES + 1, 3, 3))
    expected: dict[str, tuple[str, str, str]] = {}

    def add(name: str, content: bytes | str, stage: str = "", reason: str = "") -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        expected[name] = ("rejected", stage, reason) if reason else DONE

    for kind in ("glb", "gltf", "obj", "ply", "stl", "off", "3mf", "dae", "zae", "fbx"):
        add(f"empty.{kind}", b"", "file", "file_too_small")
    for kind in ("usd", "usda", "usdc", "usdz", "abc", "blend"):
        add(f"empty.{kind}", b"", "file", "file_too_small")
    add("a.blend", b"BLENDER-v405" + bytes(100), "load", "missing_blender")
    usda = "#usda 1.0\n"
    add("deep.usda", usda + 'def "a" {\n' * 200_000, "load", "unreadable")
    add(
        "cycle.usda", usda + 'def "a" (references = </a>) {\n}\n' + " " * 200, "load", "empty_scene"
    )
    outside = 'def "a" (references = @../../secret.usda@) {\n}\n'
    add("in/outside.usda", usda + outside + " " * 200, "load", "empty_scene")
    section = struct.pack("<16sqq", b"TOKENS", 24, 24)
    claims = struct.pack("<8s8sq", b"PXR-USDC", b"\0\x08", 48) + struct.pack("<QQQ", 1, 1 << 40, 9)
    add(
        "claims.usdc",
        claims + struct.pack("<Q", 1) + section + bytes(200),
        "load",
        "allocation_bomb",
    )
    add("empty.zip", b"", "fetch", "unreadable")
    add("cut.glb", GLB[: len(GLB) // 2], "load", "unreadable")
    add("cut.stl", stl(soup[:100])[:2000])  # the whole triangles are read, with a warning
    add("cut.zip", b"PK\x03\x04" + bytes(100), "fetch", "unreadable")
    add("cut.tar.gz", gzip.compress(os.urandom(5000))[:2000], "fetch", "unreadable")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 9\n"
    add("lfs.glb", pointer, "load", "lfs_pointer")
    add("page.glb", "<!DOCTYPE html><html>", "load", "wrong_magic")
    add("nan.obj", box(1).replace("v 0 0 0", "v nan 0 0"), "load", "non_finite_vertices")
    add("inf.obj", box(1).replace("v 0 0 0", "v 1e999 0 0"), "load", "non_finite_vertices")
    ply = "ply\nformat binary_little_endian 1.0\nelement vertex 400000000\n"
    ply += "property float x\nend_header\n"
    add("claims.ply", ply, "load", "allocation_bomb")
    add("many.stl", stl(soup), "geometry", "too_many_faces")
    add("in/good.gltf", gltf("good.bin"))
    outside = [
        "../../secret.bin",
        str(secret),
        f"file://{secret}",
        "http://127.0.0.1:9/x.bin",
        "gone.bin",
    ]
    for number, uri in enumerate(outside):
        add(f"in/outside{number}.gltf", gltf(uri), "load", "unreadable")
    for ending, maker in (("zip", make_zip), ("tar", make_tar)):
        maker(folder / f"climbs.{ending}", {"a.obj": box(1).encode(), "../../evil.obj": b"evil"})
        expected[f"climbs.{ending}"] = ("rejected", "fetch", "archive_path")
        maker(folder / f"good.{ending}", {"x/a.obj": box(1).encode(), "x/readme.txt": b""})
        expected[f"good.{ending}"] = DONE
    zeros = bytes((64 << 20) + 1)  # up to 64 MiB any ratio is allowed
    make_zip(folder / "bomb.zip", {"a.obj": zeros})
    make_zip(folder / "bomb.3mf", {"3D/3dmodel.model": zeros, "b": bytes(1 << 10)})
    make_zip(folder / "nothing.zip", {"readme.txt": b"x"})
    expected |= {
        "bomb.zip": ("rejected", "fetch", "archive_bomb"),
        "bomb.3mf": ("rejected", "load", "allocation_bomb"),
        "nothing.zip": ("rejected", "fetch", "archive_without_mesh"),
    }
    add("日本 \U0001f600 'quoted' \"twice\" $(x).obj", box(1.1))
    add("new\nline.obj", box(1.2))
    add("n" * 251 + ".obj", box(1.3))
    deep = "/".join(["d" * 200] * 15)
    (folder / deep).mkdir(parents=True)
    add(f"{deep}/deep.obj", box(1.4))
    (folder / "loop").symlink_to(folder)
    (folder / "self.obj").symlink_to("self.obj")
    (folder / "secret.bin.obj").symlink_to(secret)
    return expected


def test_a_hostile_folder(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    expected = fill(folder, tmp_path / "secret.bin")
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_symlink()}
    cfg = config(
        tmp_path / "out",
        limits={"max_failed_share": 1.0},
        source=(f"folder:{folder}",),
        filter=FilterConfig(max_faces=MAX_FACES),
    )
    source = open_source(cfg.source[0])
    total = build(cfg, [source])
    found = ends(cfg.out)
    assert {name: end for name, end in found.items() if end != expected.get(name)} == {}
    assert sorted(found) == sorted(expected)
    assert total["failed"] == 0
    (cut,) = (row for row in rows_of(cfg.out) if row.url == "cut.stl")
    assert cut.warnings == ("truncated_data",)
    assert verify(cfg.out) == []
    assert {
        path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_symlink()
    } == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meshes",
        "out",
        "secret.bin",
        "secret.usda",
    ]
    assert sorted(path.name for path in cfg.out.iterdir()) == sorted(
        ["plan.json", "plan.parquet", "sdf", "renders", "manifest", "stats", "shards"]
    )


def test_files_that_vanish_and_change_during_the_run(tmp_path):
    """Listed, then gone, closed, a folder, or another file's content by the time they are read."""
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name in ("a", "b", "c", "d", "f"):
        (folder / f"{name}.obj").write_text(box(1), encoding="utf-8")
    (folder / "e.zip").write_bytes(b"")
    make_zip(folder / "e.zip", {"a.obj": box(1).encode()})
    source = open_source(f"folder:{folder}")
    cfg = config(tmp_path / "out", source=(f"folder:{folder}",))
    make_plan(cfg, [source])
    (folder / "a.obj").unlink()
    (folder / "b.obj").unlink()
    (folder / "b.obj").mkdir()
    (folder / "c.obj").write_text("", encoding="utf-8")
    (folder / "e.zip").unlink()
    (folder / "f.obj").unlink()
    (folder / "f.obj").symlink_to("f.obj")
    build(cfg, [source])
    assert ends(cfg.out) == {
        "a.obj": ("rejected", "fetch", "file_not_readable"),
        "b.obj": ("rejected", "fetch", "file_not_readable"),
        "c.obj": ("rejected", "file", "file_too_small"),
        "d.obj": DONE,
        "e.zip": ("rejected", "fetch", "file_not_readable"),
        "f.obj": ("rejected", "fetch", "file_not_readable"),
    }
