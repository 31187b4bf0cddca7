"""Catalogue sources: records from small annotation files, mesh files from a server on loopback."""

import json
import pickle
import struct
from dataclasses import replace

import pytest

from pipeline.build import open_sources
from pipeline.config import BuildConfig
from pipeline.core.errors import Reject, Transient, UserError
from pipeline.core.hashing import make_uid
from pipeline.download.config import FetchConfig
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.side_files import SideFiles
from pipeline.orchestration.plan import make_plan, read_plan
from pipeline.sources import open_source
from pipeline.sources.annotations import Annotations
from pipeline.sources.github import GitHub, find_references
from pipeline.sources.github_list import GitHubListSource
from pipeline.sources.objaverse import ObjaverseSource
from pipeline.sources.objaverse_xl import ObjaverseXLSource
from pipeline.sources.shapenet import ShapeNetSource
from tests.pipeline.catalogues import (
    COMMIT,
    GLB,
    annotation,
    png,
    sha256,
    write_objaverse,
    write_objaverse_xl,
    write_shapenet,
)
from tests.pipeline.faulty_http_server import run_server
from tests.pipeline.mesh_io.fbx_files import binary

A, B, C = "a" * 32, "b" * 32, "c" * 32
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


LISTED = ("repository", "commit", "path", "sha256", "licence", "file")


@pytest.fixture
def server():
    with run_server() as server:
        yield server


@pytest.fixture
def client(tmp_path):
    return FetchConfig(
        cache=tmp_path / "cache", backoff_s=0.01, max_wait_s=0.1, retries=2, read_timeout_s=1.0
    )


def small_objaverse(tmp_path, client, server, **assets):
    root = write_objaverse(tmp_path / "annotations", assets)
    annotations = Annotations(root=root, fetch=client)
    return ObjaverseSource(
        annotations=annotations, fetch=client, hub=server.url, folders=("000-000", "000-001")
    )


def test_objaverse_records_follow_the_annotations(tmp_path, client, server):
    annotated = annotation(
        name="A tree",
        license="cc0",
        animationCount=2,
        tags=[{"name": "Tree"}],
        categories=[{"name": "nature"}],
    )
    source = small_objaverse(
        tmp_path,
        client,
        server,
        **{B: annotation(isAgeRestricted=True), A: annotated, C: annotation(license=None)},
    )
    records = list(source.records())
    assert [record.uid for record in records] == [
        make_uid("objaverse", key) for key in (A, C, B)
    ]  # by annotation file, then by id
    first = records[0]
    assert (first.url, first.licence, first.format) == (
        f"{server.url}/glbs/000-000/{A}.glb",
        "cc0",
        "glb",
    )
    assert json.loads(first.metadata) == {
        "name": "A tree",
        "tags": ["Tree"],
        "categories": ["nature"],
        "animations": 2,
    }
    assert [record.licence for record in records] == ["cc0", "unknown", "by"]
    assert json.loads(records[2].metadata)["age_restricted"] is True
    assert server.requests == []


def test_missing_annotations_are_downloaded_once_and_hashed_in_the_plan(tmp_path, client, server):
    there = write_objaverse(tmp_path / "there", {A: annotation(), B: annotation()})
    server.files |= {
        "/" + path.relative_to(there / "hf-objaverse-v1").as_posix(): path.read_bytes()
        for path in there.rglob("*.gz")
    }
    annotations = Annotations(root=tmp_path / "here", fetch=client)
    source = ObjaverseSource(
        annotations=annotations, fetch=client, hub=server.url, folders=("000-000", "000-001")
    )
    make_plan(BuildConfig(source=("objaverse",), out=tmp_path / "out"), [source])
    assert len(server.requests) == 3
    assert len(list(source.records())) == 2
    assert len(server.requests) == 3
    snapshot = read_plan(tmp_path / "out").info.snapshots["objaverse"]
    assert snapshot == replace(source, annotations=Annotations(root=there)).snapshot()
    write_objaverse(there, {A: annotation(), B: annotation(name="other")})
    assert snapshot != replace(source, annotations=Annotations(root=there)).snapshot()


def test_missing_or_damaged_annotations_have_a_one_line_error(tmp_path, client, server):
    source = ObjaverseSource(
        annotations=Annotations(root=tmp_path, fetch=client), fetch=client, hub=server.url
    )
    with pytest.raises(
        UserError, match=r"cannot download the annotations .*http_404.*put the file at"
    ):
        list(source.records())
    source = small_objaverse(tmp_path, client, server, **{A: annotation()})
    path = tmp_path / "annotations/hf-objaverse-v1/metadata/000-000.json.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        list(source.records())
    source = small_objaverse_xl(tmp_path, client, server, github=[])
    (tmp_path / "xl/github/github.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is damaged"):
        list(source.records())


def test_objaverse_downloads_the_file_of_a_record(tmp_path, client, server):
    source = pickle.loads(
        pickle.dumps(small_objaverse(tmp_path, client, server, **{A: annotation()}))
    )
    (record,) = source.records()
    server.files[f"/glbs/000-000/{A}.glb"] = GLB
    assert source.materialize(record, tmp_path / "scratch").read_bytes() == GLB
    with pytest.raises(Reject, match="file_too_large"):
        replace(source, max_bytes=10).materialize(record, tmp_path / "scratch")


def small_objaverse_xl(tmp_path, client, server, **rows):
    """Objaverse-XL on the test server. Without Sketchfab rows it does not read Objaverse 1.0."""
    root = write_objaverse_xl(tmp_path / "xl", rows)
    hosts = GitHub(site=f"{server.url}/site", files=f"{server.url}/raw")
    return ObjaverseXLSource(
        annotations=Annotations(root=root, fetch=client),
        fetch=client,
        places=tuple(rows),
        hub=f"{server.url}/hub",
        thingiverse=f"{server.url}/things",
        github=hosts,
    )


def blob(server, path):
    return f"{server.url}/site/ann/meshes/blob/{COMMIT}/{path}"


def test_objaverse_xl_records_have_download_urls(tmp_path, client, server):
    write_objaverse(tmp_path / "xl", {A: annotation()})
    source = small_objaverse_xl(
        tmp_path,
        client,
        server,
        github=[(blob(server, "x y/a.GLB"), "MIT License", "GLB", sha256(GLB))],
        thingiverse=[
            (
                "https://www.thingiverse.com/thing:1/files?fileId=22",
                "Creative Commons - Attribution",
                "stl",
                None,
            )
        ],
        smithsonian=[
            (
                "https://3d-api.si.edu/x.glb",
                "http://creativecommons.org/publicdomain/zero/1.0/",
                "glb",
                "ab",
            )
        ],
        sketchfab=[
            (f"https://sketchfab.com/3d-models/{A}", "by-nc", "glb", "cd"),
            ("https://x/gone", "by", "glb", "ef"),
        ],
    )
    records = list(source.records())
    assert [(record.url, record.licence, record.format, record.sha256) for record in records] == [
        (blob(server, "x y/a.GLB"), "mit", "glb", sha256(GLB)),
        (f"{server.url}/things/download:22", "by", "stl", None),
        ("https://3d-api.si.edu/x.glb", "cc0", "glb", "ab"),
        (f"{server.url}/hub/glbs/000-000/{A}.glb", "by-nc", "glb", "cd"),
    ]
    assert records[0].uid == make_uid("objaverse-xl", blob(server, "x y/a.GLB"))
    assert len(source.snapshot()) == 64


def materialized(tmp_path, source):
    (record,) = source.records()
    return source.materialize(record, tmp_path / f"scratch{len(list(tmp_path.iterdir()))}")


def test_a_blob_is_downloaded_from_its_commit(tmp_path, client, server):
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "x y/a#1.glb"), "MIT", "glb", sha256(GLB))]
    )
    server.files[f"/raw/ann/meshes/{COMMIT}/x%20y/a%231.glb"] = GLB
    assert materialized(tmp_path, source).read_bytes() == GLB


def test_a_url_with_a_branch_is_rejected(tmp_path, client, server):
    url = blob(server, "a.glb").replace(COMMIT, "main")
    with pytest.raises(Reject, match="not_pinned"):
        materialized(
            tmp_path,
            small_objaverse_xl(tmp_path, client, server, github=[(url, "MIT", "glb", None)]),
        )


def github_list(path, *rows):
    """Write a list of rows (repository, path, content, file). All are CC0."""
    lines = [
        f"{repository},{COMMIT},{name},{sha256(content)},CC0-1.0,{file}"
        for repository, name, content, file in rows
    ]
    path.write_text("\n".join([",".join(LISTED), *lines]) + "\n", encoding="utf-8")
    return path


def test_a_list_of_github_files_is_downloaded_or_read_from_a_folder(tmp_path, client, server):
    gltf = json.dumps({"buffers": [{"uri": "a%20b.bin"}], "images": [{"uri": "../t.png"}]}).encode()
    path = github_list(
        tmp_path / "list.csv",
        ("ann/meshes", "kit/gltf/a b.gltf", gltf, "kit/a.gltf"),
        ("bob/props", "x.GLB", GLB, ""),
    )
    hosts = GitHub(site=f"{server.url}/site", files=f"{server.url}/raw")
    here = f"/raw/ann/meshes/{COMMIT}/kit"
    server.files |= {
        f"{here}/gltf/a%20b.gltf": gltf,
        f"{here}/gltf/a%20b.bin": b"12",
        f"{here}/t.png": png(),
        f"/raw/bob/props/{COMMIT}/x.GLB": GLB,
    }
    online = GitHubListSource(path=path, fetch=client, github=hosts)
    first, second = online.records()
    assert (first.url, second.url) == (
        f"{server.url}/site/ann/meshes/blob/{COMMIT}/kit/gltf/a b.gltf",
        f"{server.url}/site/bob/props/blob/{COMMIT}/x.GLB",
    )
    assert (first.uid, first.licence) == (make_uid("folder", "kit/a.gltf"), "cc0")
    assert second.uid == make_uid("github", second.url)
    assert (first.format, second.format, second.sha256) == ("gltf", "glb", sha256(GLB))
    downloaded = online.materialize(first, tmp_path / "s1")
    assert downloaded.read_bytes() == gltf
    assert (downloaded.parent / "a b.bin").read_bytes() == b"12"
    assert (downloaded.parent.parent / "t.png").exists()
    assert online.materialize(second, tmp_path / "s2").read_bytes() == GLB
    with pytest.raises(Reject, match="wrong_sha256"):
        online.materialize(replace(second, sha256="0" * 64), tmp_path / "s3")

    folder = tmp_path / "files"
    for name, content in (("kit/a.gltf", gltf), ("bob/props/x.GLB", GLB)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    asked = len(server.requests)
    local = pickle.loads(pickle.dumps(replace(online, folder=folder)))
    assert list(local.records()) == [first, second]
    assert local.snapshot() == online.snapshot()
    assert local.materialize(first, tmp_path / "s4") == folder / "kit/a.gltf"
    assert local.materialize(second, tmp_path / "s5") == folder / "bob/props/x.GLB"
    assert local.side_file_root == folder
    assert len(server.requests) == asked
    (folder / "bob/props/x.GLB").unlink()
    with pytest.raises(FileNotFoundError):
        local.materialize(second, tmp_path / "s6")


def test_the_specification_of_a_github_list_names_the_list_and_a_folder(tmp_path):
    path = github_list(tmp_path / "list.csv", ("ann/meshes", "a.glb", GLB, ""))
    online = open_source(f"github:{path}", max_bytes=5)
    assert (online.path, online.folder, online.max_bytes) == (path, None, 5)
    assert open_source(f"github:{path}?folder={tmp_path}").folder == tmp_path
    for options, words in (
        ("?folder=/no/such", "no folder /no/such"),
        ("?folder=", "folder must name one directory, got 0"),
        ("?place=x", "unknown option 'place'"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(f"github:{path}{options}")
    with pytest.raises(UserError, match=r"no\.csv: No such file or directory; name a readable csv"):
        open_source(f"github:{tmp_path}/no.csv")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", r"names no asset; .* columns repository, commit, .* at least one row"),
        (f"ann,{COMMIT},a.glb,{'0' * 64},CC0,", r"row 1 has no usable repository, got 'ann'"),
        (f"ann/m,main,a.glb,{'0' * 64},CC0,", r"row 1 has no usable commit, got 'main'"),
        (f"ann/m,{COMMIT},a/../b.glb,{'0' * 64},CC0,", r"no usable path, got 'a/\.\./b\.glb'"),
        (f"ann/m,{COMMIT},/b.glb,{'0' * 64},CC0,", r"no usable path, got '/b\.glb'"),
        (f"ann/m,{COMMIT},a.glb,12,CC0,", r"row 1 has no usable sha256, got '12'"),
        (f"ann/m,{COMMIT},a.glb,{'0' * 64},,", r"no usable licence, got ''; .* columns repository"),
        ("\n".join(2 * [f"ann/m,{COMMIT},a.glb,{'0' * 64},CC0,"]), r"row 2 repeats .*/a\.glb or"),
        (
            "\n".join(f"ann/m,{COMMIT},{name}.glb,{'0' * 64},CC0,x.glb" for name in "ab"),
            r"row 2 repeats .* or its file x\.glb",
        ),
    ],
)
def test_a_list_with_an_unusable_row_is_refused(tmp_path, row, words):
    path = tmp_path / "list.csv"
    path.write_text(f"{','.join(LISTED)}\n{row}\n", encoding="utf-8")
    with pytest.raises(UserError, match=words):
        open_source(f"github:{path}")


def lfs(server, content, oid):
    server.files |= {
        "/store/1": content,
        f"/raw/ann/meshes/{COMMIT}/a.glb": POINTER.format(oid, len(content)).encode(),
    }
    asked = []

    def batch(body):
        asked.append(body)
        actions = {
            "download": {"href": f"{server.url}/store/1", "header": {"Authorization": "token"}}
        }
        return {"objects": [{"oid": oid, "size": len(content), "actions": actions}]}

    server.post_handlers["/site/ann/meshes.git/info/lfs/objects/batch"] = batch
    return asked


def test_lfs_pointers_are_resolved(tmp_path, client, server):
    oid = sha256(GLB)
    asked = lfs(server, GLB, oid)
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "a.glb"), "MIT", "glb", oid)]
    )
    assert materialized(tmp_path, source).read_bytes() == GLB
    assert asked[0]["objects"] == [{"oid": oid, "size": len(GLB)}]
    assert dict(server.requests[-1][1])["Authorization"] == "token"


def test_a_missing_or_different_lfs_object_is_rejected(tmp_path, client, server):
    lfs(server, GLB, "0" * 64)
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "a.glb"), "MIT", "glb", None)]
    )
    with pytest.raises(Reject, match="wrong_sha256"):
        materialized(tmp_path, source)
    server.post_handlers["/site/ann/meshes.git/info/lfs/objects/batch"] = lambda body: {
        "objects": [{"error": {"code": 404}}]
    }
    lfs_source = replace(source, fetch=replace(client, cache=tmp_path / "other"))
    with pytest.raises(Reject, match="lfs_missing"):
        materialized(tmp_path, lfs_source)
    (record,) = source.records()
    with pytest.raises(Reject, match="wrong_sha256"):
        source.materialize(replace(record, sha256="1" * 64), tmp_path / "s3")
    with pytest.raises(Reject, match="file_too_large"):
        replace(
            lfs_source, max_bytes=200, fetch=replace(client, cache=tmp_path / "third")
        ).materialize(replace(record, sha256=None), tmp_path / "s4")


def test_side_files_are_downloaded_and_missing_ones_are_skipped(tmp_path, client, server):
    """An OBJ with its material beside it, a texture one directory above, and a missing texture."""
    obj = b"mtllib my mat.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvt 0 0\n"
    obj += b"f 1/1 3/1 2/1\nf 1/1 2/1 4/1\n"
    mtl = b"newmtl m\nmap_Kd -s 1 1 1 ../tex/a.png\nmap_Bump gone.png\n"
    mtl += b"map_d ../../../../etc/passwd\nmap_Ks http://x/y.png\n"
    here = f"/raw/ann/meshes/{COMMIT}/models"
    server.files |= {
        f"{here}/a.obj": obj,
        f"{here}/my%20mat.mtl": mtl,
        f"/raw/ann/meshes/{COMMIT}/tex/a.png": png(),
    }
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "models/a.obj"), "MIT", "obj", sha256(obj))]
    )
    path = materialized(tmp_path, source)
    repository = path.parent.parent
    files = [file for file in repository.rglob("*") if file.is_file()]
    assert sorted(file.relative_to(repository).as_posix() for file in files) == [
        "models/a.obj",
        "models/my mat.mtl",
        "tex/a.png",
    ]
    assert SideFiles(path, repository, WarningLog()).read("../tex/a.png") == png()
    assert not [visit for visit, _ in server.requests if "passwd" in visit]


def test_images_of_an_fbx_file_are_found_by_name_and_in_folders_of_textures(
    tmp_path, client, server
):
    names = {
        5: "..\\Tex\\a.png",  # as it lies there
        6: "C:\\work\\b.png",  # beside the file
        7: "/home/x/maps/c.png",  # in a folder of textures
        8: "C:\\work\\gone.png",
        9: "C:\\work\\inside.png",
    }
    content = [("Content", [png()], [])]
    objects = [
        (
            "Video",
            [key, "Video::v", "Clip"],
            [("RelativeFilename", [name], []), *(content * (key == 9))],
        )
        for key, name in names.items()
    ]
    here = f"/raw/ann/meshes/{COMMIT}"
    fbx = binary([("Objects", [], objects)])
    server.files |= {
        f"{here}/models/a.fbx": fbx,
        f"{here}/Tex/a.png": png(),
        f"{here}/models/b.png": png(),
        f"{here}/models/textures/c.png": png(),
    }
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "models/a.fbx"), "MIT", "fbx", sha256(fbx))]
    )
    repository = materialized(tmp_path, source).parent.parent
    files = [file for file in repository.rglob("*") if file.is_file()]
    assert sorted(file.relative_to(repository).as_posix() for file in files) == [
        "Tex/a.png",
        "models/a.fbx",
        "models/b.png",
        "models/textures/c.png",
    ]
    assert not [visit for visit, _ in server.requests if "inside" in visit]


def test_a_temporary_error_of_a_side_file_is_not_a_rejection(tmp_path, client, server):
    here = f"/raw/ann/meshes/{COMMIT}"
    server.files |= {f"{here}/a.obj": b"mtllib a.mtl\n", f"{here}/a.mtl": b""}
    server.scripts[f"{here}/a.mtl"] = ["status 500", "always"]
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "a.obj"), "MIT", "obj", None)]
    )
    with pytest.raises(Transient, match="http_500"):
        materialized(tmp_path, source)


def glb(document: bytes) -> bytes:
    text = document.ljust(-(-len(document) // 4) * 4)
    chunk = struct.pack("<I4s", len(text), b"JSON") + text
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunk)) + chunk


def test_a_glb_file_is_downloaded_with_the_texture_that_it_names(tmp_path, client, server):
    here = f"/raw/ann/meshes/{COMMIT}/models"
    document = json.dumps({"images": [{"uri": "Textures/a%20b.png"}, {"bufferView": 0}]})
    content = glb(document.encode())
    server.files |= {f"{here}/a.glb": content, f"{here}/Textures/a%20b.png": b"png"}
    source = small_objaverse_xl(
        tmp_path, client, server, github=[(blob(server, "models/a.glb"), "MIT", "glb", None)]
    )
    path = materialized(tmp_path, source)
    assert (path.parent / "Textures" / "a b.png").read_bytes() == b"png"
    broken = {"cut": content[:-4], "old": content.replace(b"\2", b"\1", 1), "short": b"glTF"}
    for name, damaged in (broken | {"none": b"", "list": glb(b"[1]")}).items():
        (tmp_path / f"{name}.glb").write_bytes(damaged)
        assert find_references(tmp_path / f"{name}.glb") == []


def test_references_of_gltf_and_dae_files_are_found(tmp_path):
    gltf = {
        "buffers": [{"uri": "a%20b.bin"}, {"uri": "data:x"}, {}],
        "images": [{"uri": "t/c.png"}, {"uri": "x" * 300}],
    }
    (tmp_path / "a.gltf").write_text(json.dumps(gltf), encoding="utf-8")
    (tmp_path / "a.dae").write_text(
        "<library_images><image><init_from>t\\d.jpg</init_from></image></library_images>",
        encoding="utf-8",
    )
    (tmp_path / "b.gltf").write_text("[1", encoding="utf-8")
    (tmp_path / "c.gltf").write_text(
        '{"buffers": [1, {"uri": "x\\u0000y"}, {"uri": "/etc/passwd"}]}', encoding="utf-8"
    )
    assert find_references(tmp_path / "a.gltf") == ["a b.bin", "t/c.png"]
    assert find_references(tmp_path / "a.dae") == ["t/d.jpg"]
    assert find_references(tmp_path / "b.gltf") == find_references(tmp_path / "c.gltf") == []


CHAIR, PLANE = "03001627", "02691156"
TAXONOMY = [
    {"synsetId": CHAIR, "name": "chair"},
    {"synsetId": PLANE, "name": "airplane,aeroplane,plane"},
]


@pytest.fixture(params=[(1, ()), (2, ()), (2, (CHAIR,))], ids=["v1", "v2", "v2 zipped"])
def shapenet_core(request, tmp_path):
    version, zipped = request.param
    root = tmp_path / "ShapeNetCore"
    root.mkdir()
    write_shapenet(root, version, {CHAIR: ["b1", "a1"], PLANE: ["c1"]}, zipped=zipped)
    (root / "taxonomy.json").write_text(json.dumps(TAXONOMY), encoding="utf-8")
    rows = [
        "1,03001627,03001627,a1,train",
        "2,03001627,03001627,b1,test",
        "3,2691156,2691156,c1,val",
    ]  # spreadsheets drop the leading zeros
    (root / "all.csv").write_text(
        "id,synsetId,subSynsetId,modelId,split\n" + "\n".join(rows) + "\n", encoding="utf-8"
    )
    return root


def test_shapenet_models_load_in_every_layout(shapenet_core, tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"shapenet:{shapenet_core}")))
    records = list(source.records())
    keys = [f"{PLANE}/c1", f"{CHAIR}/a1", f"{CHAIR}/b1"]
    assert [record.uid for record in records] == [make_uid("shapenet", key) for key in keys]
    annotated = [json.loads(record.metadata) for record in records]
    assert annotated[0] == {
        "name": "airplane",
        "categories": [PLANE, "airplane", "aeroplane", "plane"],
        "split": "val",
    }
    assert [about["split"] for about in annotated] == ["val", "train", "test"]
    assert {record.licence for record in records} == {"shapenet"}
    for number, record in enumerate(records):
        (tmp_path / str(number)).mkdir()
        mesh, report = load_with_report(
            source.materialize(record, tmp_path / str(number)), LoadConfig()
        )
        assert report.warnings == ()
        texture = mesh.parts[0].material.texture
        assert texture is not None
        assert (texture.reshape(-1, 4) == [255, 0, 0, 255]).all()


def test_categories_and_splits_select_models(shapenet_core):
    def ids(options):
        records = open_source(f"shapenet:{shapenet_core}?{options}").records()
        paths = [record.url.partition("!/")[2] or record.url for record in records]
        return [path.split("/")[1] for path in paths]

    assert ids("categories=chair") == ids(f"categories={CHAIR}") == ["a1", "b1"]
    assert ids("categories=plane,chair&splits=train,val") == ["c1", "a1"]
    assert ids("splits=test") == ["b1"]
    wrong = {
        "categories=dog": "no category 'dog'",
        "splits=x": "is selected",
        "category=chair": "unknown",
    }
    for options, words in wrong.items():
        with pytest.raises(UserError, match=words):
            open_source(f"shapenet:{shapenet_core}?{options}")


def test_a_split_file_that_is_not_utf8_is_an_error(shapenet_core):
    (shapenet_core / "names.csv").write_bytes("modelId,naïve\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"cannot read .*names\.csv: .*; move it away"):
        open_source(f"shapenet:{shapenet_core}")


def test_a_deleted_shapenet_model_is_a_missing_file(shapenet_core, tmp_path):
    source = ShapeNetSource(root=shapenet_core)
    record = next(source.records())
    with pytest.raises(FileNotFoundError):
        source.materialize(replace(record, url=record.url.replace("c1", "c2")), tmp_path)


def test_shapenet_needs_its_licence_to_be_allowed(shapenet_core):
    cfg = BuildConfig(source=(f"shapenet:{shapenet_core}",))
    with pytest.raises(UserError, match="--license-allow shapenet"):
        open_sources(cfg)
    accepted = replace(cfg, filter=replace(cfg.filter, licences=("shapenet",)))
    assert [source.name for source in open_sources(accepted)] == ["shapenet"]


def test_two_folder_sources_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.obj").touch()
    with pytest.raises(UserError, match="two sources are of the kind folder"):
        open_sources(BuildConfig(source=(f"folder:{tmp_path}/a", f"folder:{tmp_path}")))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("objaverse-xl?places=myspace", "places must be among github"),
        ("objaverse-xl?place=github", "unknown option 'place'"),
        ("objaverse?x=1", "unknown source"),
        ("shapenet:/no/such", "no folder /no/such"),
        ("shapenet:", "unknown source"),
    ],
)
def test_an_invalid_specification_is_refused(spec, words):
    with pytest.raises(UserError, match=words):
        open_source(spec)


def test_specifications_of_catalogues_are_parsed(tmp_path):
    assert open_source("objaverse").annotations.folder.name == ".objaverse"
    source = open_source(f"objaverse-xl:{tmp_path}?places=github,smithsonian", max_bytes=5)
    assert (source.annotations.folder, source.places, source.max_bytes) == (
        tmp_path,
        ("github", "smithsonian"),
        5,
    )
