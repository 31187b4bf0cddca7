"""The folder source: which files are assets, in which order, and the errors of unusable folders."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.build import open_sources
from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.mesh_io.formats import MESH_FORMATS
from pipeline.orchestration.plan import make_plan
from pipeline.sources import open_source
from pipeline.sources.folder import FolderSource


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def urls(folder: Path) -> list[str]:
    return [record.url for record in open_source(f"folder:{folder}").records()]


def test_meshes_of_every_format_are_sorted_by_relative_path(tmp_path):
    names = [
        "b.GLB",
        "a/z.obj",
        "a/b/c.Stl",
        "Z.ply",
        "é.off",
        "x.3MF",
        "x.dae",
        "x.zae",
        "x.fbx",
        "x.usd",
        "x.usda",
        "x.usdc",
        "x.usdz",
        "x.abc",
        "x.blend",
        "x.gltf",
        "a.b.glb",
    ]
    make_files(tmp_path, *names, "a/z.mtl", "x.bin", "t.png", "notes.txt", "glb", ".hidden.docx")
    assert urls(tmp_path) == sorted(names)
    source = open_source(f"folder:{tmp_path}")
    # The file "glb" has no extension. Side files are not counted.
    assert source.skipped == {"txt": 1, "": 1, "docx": 1}
    assert {record.format for record in source.records()} == MESH_FORMATS


def test_a_record_depends_only_on_the_relative_path(tmp_path):
    here, there = (
        make_files(tmp_path / "here", "sub/a.glb"),
        make_files(tmp_path / "there", "sub/a.glb"),
    )
    (first,), (second,) = (
        list(open_source(f"folder:{folder}").records()) for folder in (here, there)
    )
    assert first == second
    assert first.uid == make_uid("folder", "sub/a.glb")
    assert (first.source, first.url, first.licence, first.format) == (
        "folder",
        "sub/a.glb",
        "unknown",
        "glb",
    )


def test_materialize_returns_the_file_itself_also_after_pickling(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(f"folder:{make_files(tmp_path, 'sub/a.glb')}")))
    (record,) = source.records()
    assert source.materialize(record, tmp_path / "scratch") == tmp_path / "sub/a.glb"
    assert not (tmp_path / "scratch").exists()


def test_a_relative_folder_does_not_depend_on_later_working_directories(tmp_path, monkeypatch):
    make_files(tmp_path, "meshes/a.glb")
    monkeypatch.chdir(tmp_path)
    source = open_source("folder:meshes")
    monkeypatch.chdir("/")
    (record,) = source.records()
    assert source.materialize(record, tmp_path).read_bytes() == b"meshes/a.glb"


def test_only_links_to_files_inside_the_folder_count(tmp_path):
    outside = make_files(tmp_path / "outside", "secret.glb")
    folder = make_files(tmp_path / "folder", "a/real.glb")
    (folder / "alias.glb").symlink_to("a/real.glb")
    (folder / "out.glb").symlink_to(outside / "secret.glb")
    (folder / "outdir").symlink_to(outside)
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone.glb").symlink_to("nothing.glb")
    assert urls(folder) == ["a/real.glb", "alias.glb"]


def test_a_name_that_is_not_utf8_is_skipped(tmp_path):
    make_files(tmp_path, "a.glb")
    with open(os.fsencode(tmp_path) + b"/\xff.glb", "wb"):  # noqa: PTH123
        pass
    assert urls(tmp_path) == ["a.glb"]
    assert open_source(f"folder:{tmp_path}").skipped == {"(not UTF-8)": 1}


def test_outputs_of_builds_are_skipped(tmp_path, monkeypatch):
    """Another build and the current one are skipped. A plan.json alone is a user's file."""
    build = [
        "plan.json",
        "plan.parquet",
        "renders/paper/000000.tar",
        "renders/paper/000000.index.parquet",
    ]
    make_files(
        tmp_path,
        "a.glb",
        "b/plan.json",
        "b/b.glb",
        *(f"c/old/{name}" for name in build),
        "c/new/.plan.parquet.partial",
    )
    monkeypatch.chdir(tmp_path)
    cfg = BuildConfig(source=(f"folder:{tmp_path}",), out=Path("c/new"))
    (source,) = open_sources(cfg)
    assert [record.url for record in source.records()] == ["a.glb", "b/b.glb"]
    assert source.skipped == {"json": 1}
    assert make_plan(cfg, [source]).assets == 2
    assert urls(tmp_path) == ["a.glb", "b/b.glb"]
    (source,) = open_sources(replace(cfg, out=tmp_path))  # a later check refuses this
    assert len(list(source.records())) == 2


def test_a_link_is_checked_again_when_it_is_opened(tmp_path):
    outside = make_files(tmp_path / "outside", "secret.glb")
    folder = make_files(tmp_path / "folder", "a.glb")
    source = open_source(f"folder:{folder}")
    (record,) = source.records()
    (folder / "a.glb").unlink()
    (folder / "a.glb").symlink_to(outside / "secret.glb")
    with pytest.raises(FileNotFoundError, match=r"a\.glb"):
        source.materialize(record, tmp_path)
    (folder / "a.glb").unlink()
    with pytest.raises(FileNotFoundError):
        source.materialize(record, tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:{}/missing", "no folder"),
        ("folder:{}/file.glb", "is a file"),
        ("folder:{}/empty", "no mesh file"),
        ("folder:", "unknown source"),
        ("folder:~nosuchuser/x", "no home directory for ~nosuchuser"),
        ("procedural:x", "1 or more"),
        ("s3:{}", "unknown source"),
        ("", "unknown source"),
    ],
)
def test_a_specification_that_cannot_be_opened_has_a_one_line_error(tmp_path, spec, message):
    make_files(tmp_path, "file.glb", "empty/readme.md")
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda *_: False
    )  # root, as which the tests may run, can read everything
    with pytest.raises(UserError, match="cannot read"):
        open_source(f"folder:{make_files(tmp_path, 'a.glb')}")


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8),
        max_size=6,
    )
)
def test_the_order_is_that_of_the_paths_for_all_names(tmp_path_factory, stems):
    folder = tmp_path_factory.mktemp("names")
    names = {f"x{stem}.glb" for stem in stems} | {"x.glb"}
    for name in names:
        (folder / name).touch()
    assert urls(folder) == sorted(p.name for p in folder.iterdir())


def test_constructing_a_source_reads_nothing(tmp_path):
    FolderSource(root=tmp_path / "not there yet")  # nothing is read before records()
