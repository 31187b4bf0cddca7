"""Harmful, damaged and valid archives."""

import contextlib
import os
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import Reject
from pipeline.mesh_io.archive import (
    ArchiveLimits,
    archive_format,
    extract,
    find_only_mesh,
    unpack_mesh,
)
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.side_files import SideFiles
from tests.pipeline.archive_files import make_tar, make_zip

LIMITS = ArchiveLimits()


def make_archive(path, members):
    return make_zip(path, members) if path.suffix == ".zip" else make_tar(path, members)


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tgz", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.tar.xz", "w:xz")],
)
def test_tar_archives_of_every_compression_are_unpacked(tmp_path, name, mode):
    path = make_tar(tmp_path / name, {"m/a.obj": b"one", "m/a.mtl": b"two"}, mode)
    files = extract(path, tmp_path / "out", LIMITS)
    assert [
        (file.relative_to(tmp_path / "out").as_posix(), file.read_bytes()) for file in files
    ] == [
        ("m/a.obj", b"one"),
        ("m/a.mtl", b"two"),
    ]
    assert archive_format(name) == name.partition(".")[2]


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_later_of_two_members_of_one_name_replaces_the_earlier(tmp_path, name):
    """As `tar --append` writes an updated file. It was taken for two meshes."""
    path = make_archive(tmp_path / name, {"m/a.obj": b"old"})
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("m/a.obj", b"new")
    else:
        (tmp_path / "new").write_bytes(b"new")
        with tarfile.open(path, "a") as archive:
            archive.add(tmp_path / "new", "m/a.obj")
    files = extract(path, tmp_path / "out", LIMITS)
    assert [file.read_bytes() for file in files] == [b"new"]
    assert find_only_mesh(files, tmp_path / "out") == tmp_path / "out" / "m" / "a.obj"


def test_only_members_below_a_folder_are_unpacked(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"x/a.obj": b"1", "x/b/c.png": b"2", "xy/d.obj": b"3"})
    files = extract(path, tmp_path / "out", LIMITS, below="x")
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == [
        "x/a.obj",
        "x/b/c.png",
    ]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name",
    [
        "../evil.obj",
        "a/../../evil.obj",
        "/evil.obj",
        "..\\evil.obj",
        "C:\\evil.obj",
        "x" * 300 + ".obj",
    ],
)
def test_no_member_is_written_outside_the_folder(tmp_path, kind, name):
    (tmp_path / "deep/out").mkdir(parents=True)
    path = make_archive(tmp_path / f"a.{kind}", {"good.obj": b"x", name: b"evil"})
    with pytest.raises(Reject, match="archive_path"):
        extract(path, tmp_path / "deep/out", LIMITS)
    outside = [
        p for p in tmp_path.rglob("*") if p.is_file() and "out" not in p.relative_to(tmp_path).parts
    ]
    assert outside == [path]


@pytest.mark.parametrize("name", [".", "./", "..", "/"])
def test_names_of_directories_do_not_matter(tmp_path, name):
    folder = tarfile.TarInfo(name)
    folder.type = tarfile.DIRTYPE
    path = make_tar(tmp_path / "a.tar", {name: folder, "./a.obj": b"x"})
    assert extract(path, tmp_path / "out", LIMITS) == [tmp_path / "out/a.obj"]


def test_links_and_devices_are_skipped_and_not_written_through(tmp_path):
    (tmp_path / "outside").mkdir()
    members = {
        "l": link("l", str(tmp_path / "outside")),
        "l/evil.obj": b"evil",
        "h": link("h", "/etc/passwd", tarfile.LNKTYPE),
        "d": link("d", "", tarfile.CHRTYPE),
        "f": link("f", "", tarfile.FIFOTYPE),
    }
    files = extract(make_tar(tmp_path / "a.tar", members), tmp_path / "out", LIMITS)
    assert [file.relative_to(tmp_path / "out").as_posix() for file in files] == ["l/evil.obj"]
    assert not list((tmp_path / "outside").iterdir())
    assert stat.S_ISREG(files[0].lstat().st_mode)


def test_a_symlink_in_a_zip_is_skipped(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert extract(tmp_path / "a.zip", tmp_path / "out", LIMITS) == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_too_many_members_are_rejected(tmp_path, kind):
    path = make_archive(tmp_path / f"a.{kind}", {f"{n}.obj": b"" for n in range(11)})
    extract(path, tmp_path / "fits", ArchiveLimits(max_members=11))
    with pytest.raises(Reject, match="archive_bomb"):
        extract(path, tmp_path / "out", ArchiveLimits(max_members=10))


def test_a_zip_bomb_is_recognised_by_its_claimed_size(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.obj": bytes(70 << 20)})
    with pytest.raises(Reject, match="archive_bomb") as caught:
        extract(path, tmp_path / "out", LIMITS)
    assert caught.value.numbers == {"bytes": 70 << 20, "allowed": 1 << 26}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_tar_bomb_is_recognised_before_it_is_unpacked(tmp_path, mode):
    path = make_tar(tmp_path / "a.tar", {"a.obj": bytes(70 << 20)}, mode)
    with pytest.raises(Reject, match="archive_bomb"):
        extract(path, tmp_path / "out", LIMITS)
    assert not (tmp_path / "out").exists()


def test_a_zip_with_false_sizes_unpacks_no_more_than_it_claims(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.obj": bytes(1 << 20)})
    content = path.read_bytes().replace(
        (1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    )
    path.write_bytes(content)
    with pytest.raises(Reject, match="unreadable"):  # the checksum
        extract(path, tmp_path / "out", LIMITS)
    assert sum(file.stat().st_size for file in (tmp_path / "out").rglob("*")) <= 100


def test_unpacked_bytes_are_counted_whatever_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.mesh_io.archive._check_limits", lambda *_: None)
    path = make_tar(tmp_path / "a.tar", {f"{n}.obj": bytes(1000) for n in range(10)})
    with pytest.raises(Reject, match="archive_bomb"):
        extract(path, tmp_path / "out", ArchiveLimits(max_bytes=5500))
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 5500


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"x" * 700]
)
def test_other_files_are_unreadable(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(Reject, match="unreadable"):
        extract(tmp_path / "a.zip", tmp_path / "out", LIMITS)


def test_a_file_of_zeros_is_an_empty_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    assert extract(tmp_path / "a.tar", tmp_path / "out", LIMITS) == []


def test_an_encrypted_zip_is_unreadable(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a.obj": b"x" * 100})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(Reject, match="unreadable"):
        extract(path, tmp_path / "out", LIMITS)


def test_a_full_disk_is_not_a_rejection(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {"a.obj": b"x"})
    (tmp_path / "out").symlink_to("/dev/full")
    with pytest.raises(Reject, match="archive_path"):  # a file in place of the folder
        extract(path, tmp_path / "out", LIMITS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.obj").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        extract(path, tmp_path / "full", LIMITS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["scene.gltf", "scene.bin", "textures/a.png"], "scene.gltf"),
        (["x/y/a.obj", "x/y/z/b.obj"], "x/y/a.obj"),
        (["__MACOSX/a.obj", ".hidden/b.obj", "c/d.STL"], "c/d.STL"),
        (["a.obj", "b.obj"], "archive_ambiguous"),
        (["chair.fbx", "chair.usdz", "chair.blend", "x/chair.obj"], "x/chair.obj"),
        (["chair.usdc", "x/chair.FBX"], "x/chair.FBX"),
        (["chair.blend", "chair.abc"], "chair.abc"),
        (["a.usda", "b.usd"], "archive_ambiguous"),
        (["readme.txt"], "archive_without_mesh"),
        ([], "archive_without_mesh"),
    ],
)
def test_the_topmost_mesh_of_an_archive_is_found(tmp_path, names, expected):
    files = [tmp_path / name for name in names]
    if expected.startswith("archive"):
        with pytest.raises(Reject, match=expected):
            find_only_mesh(files, tmp_path)
    else:
        assert find_only_mesh(files, tmp_path) == tmp_path / expected


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["zip", "tar", "tgz"]),
    flips=st.integers(1, 40),
)
def test_damaged_archives_are_read_or_rejected_inside_the_folder(
    tmp_path_factory, seed, kind, flips
):
    folder = tmp_path_factory.mktemp("fuzz")
    members = {"m/a.obj": b"v 0 0 0\n" * 40, "m/a.mtl": b"x", "../up": b"y" * 10}
    if seed % 2:
        del members["../up"]
    path = folder / f"a.{kind}"
    make_zip(path, members) if kind == "zip" else make_tar(
        path, members, "w:gz" if kind == "tgz" else "w"
    )
    draw = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(flips):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content[: draw.randrange(1, len(content) + 1)] if seed % 3 else content)
    (folder / "in" / "out").mkdir(parents=True)
    files: list[Path] = []
    with contextlib.suppress(Reject):  # nothing else may be raised
        files = extract(path, folder / "in" / "out", ArchiveLimits(max_bytes=1 << 20))
    assert all(file.resolve().is_relative_to(folder / "in" / "out") for file in files)
    assert [
        p for p in folder.rglob("*") if p.is_file() and folder / "in" / "out" not in p.parents
    ] == [path]
    assert sum(os.path.getsize(p) for p in (folder / "in").rglob("*") if p.is_file()) <= 1 << 20  # noqa: PTH202


def legacy_zip(path, members):
    """Write a zip whose names are bytes, without the flag that says that they are UTF-8."""
    placeholders = {"AB"[index] * len(name): name for index, name in enumerate(members)}
    make_zip(path, dict(zip(placeholders, members.values(), strict=True)))
    content = path.read_bytes()
    for placeholder, name in placeholders.items():
        content = content.replace(placeholder.encode(), name)
    path.write_bytes(content)
    return path


LEGACY_NAMES = {
    "gbk": ("模型/汽车.obj", "模型/贴图/木头.png"),
    "cp932": ("モデル/車.obj", "モデル/テクスチャ/表示.png"),
    "cp437": ("Würfel/Möbel.obj", "Würfel/été.png"),
    "cp1252": ("Würfel/Größe.obj", "Würfel/Fuß.png"),
    "utf-8": ("モデル/Größe.obj", "モデル/木头.png"),
}


@pytest.mark.parametrize("encoding", LEGACY_NAMES)
def test_names_without_a_stated_encoding_are_decoded(tmp_path, encoding):
    mesh, texture = LEGACY_NAMES[encoding]
    members = {mesh.encode(encoding): b"mesh", texture.encode(encoding): b"texture"}
    path = unpack_mesh(legacy_zip(tmp_path / "a.zip", members), tmp_path / "out", LIMITS)
    assert path.relative_to(tmp_path / "out").as_posix() == mesh
    log = WarningLog()
    files = SideFiles(path, tmp_path / "out", log)
    name = texture.partition("/")[2]
    # The mesh file may name the texture in its own encoding, and its reader in another one.
    assert files.read(name) == b"texture"
    assert files.read(name.encode(encoding).decode("latin-1")) == b"texture"
    assert log.items() == ()


def test_a_tar_with_names_of_an_old_program(tmp_path):
    names = [name.encode("gbk").decode("utf-8", "surrogateescape") for name in LEGACY_NAMES["gbk"]]
    path = make_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    mesh = unpack_mesh(path, tmp_path / "out", LIMITS)
    assert mesh.relative_to(tmp_path / "out").as_posix() == LEGACY_NAMES["gbk"][0]


def test_stated_names_have_no_other_spellings(tmp_path):
    extract(make_zip(tmp_path / "a.zip", {"Größe.obj": b"x"}), tmp_path / "out", LIMITS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Größe.obj"]


class TestArchivesInArchives:
    def inner(self, tmp_path, members, name="inner.zip"):
        return make_zip(tmp_path / name, members).read_bytes()

    def test_the_mesh_of_an_inner_archive_finds_its_textures(self, tmp_path):
        inner = self.inner(tmp_path, {"m/a.obj": b"mesh", "m/b.png": b"inner"})
        members = {"source/model.zip": inner, "textures/c.png": b"outer"}
        path = unpack_mesh(make_zip(tmp_path / "a.zip", members), tmp_path / "out", LIMITS)
        assert path == tmp_path / "out/source/model/m/a.obj"
        files = SideFiles(path, tmp_path / "out", WarningLog())
        assert files.read("b.png") == b"inner"
        assert files.read("C:\\work\\textures\\c.png") == b"outer"

    def test_the_outer_mesh_counts_and_inner_textures_are_unpacked(self, tmp_path):
        inner = self.inner(tmp_path, {"a.stl": b"inner", "b.png": b"texture"})
        members = {"deep/er/a.obj": b"mesh", "deep/er/textures.zip": inner}
        path = unpack_mesh(make_zip(tmp_path / "a.zip", members), tmp_path / "out", LIMITS)
        assert path == tmp_path / "out/deep/er/a.obj"
        assert SideFiles(path, None, WarningLog()).read("textures/b.png") == b"texture"

    def test_depth_is_bounded(self, tmp_path):
        content = self.inner(tmp_path, {"a.obj": b"mesh"})
        for level in range(1, 4):
            path = tmp_path / f"{level}.zip"
            content = make_zip(path, {f"n{level}.zip": content}).read_bytes()
            if level <= 2:
                assert unpack_mesh(path, tmp_path / f"out{level}", LIMITS).name == "a.obj"
            else:
                with pytest.raises(Reject, match="archive_without_mesh"):
                    unpack_mesh(path, tmp_path / f"out{level}", LIMITS)

    def test_the_limits_hold_for_all_together(self, tmp_path):
        inner = self.inner(tmp_path, {f"{n}.png": bytes(100) for n in range(5)})
        path = make_zip(tmp_path / "a.zip", {"a.obj": b"x", "b.zip": inner, "c.zip": inner})
        unpack_mesh(path, tmp_path / "fits", ArchiveLimits(max_members=13))
        for limits in (
            ArchiveLimits(max_members=12),
            ArchiveLimits(max_bytes=2 * len(inner) + 999),
        ):
            with pytest.raises(Reject, match="archive_bomb"):
                unpack_mesh(path, tmp_path / f"out{limits.max_members}", limits)

    def test_a_damaged_inner_archive_costs_only_itself(self, tmp_path):
        path = make_zip(tmp_path / "a.zip", {"a.obj": b"x", "b.zip": b"PK damaged"})
        assert unpack_mesh(path, tmp_path / "out", LIMITS).name == "a.obj"
        path = make_zip(tmp_path / "b.zip", {"b.zip": b"PK damaged"})
        with pytest.raises(Reject, match="archive_without_mesh"):
            unpack_mesh(path, tmp_path / "out2", LIMITS)

    def test_an_inner_archive_does_not_leave_the_folder(self, tmp_path):
        inner = self.inner(tmp_path, {"../../evil.obj": b"x"})
        path = make_zip(tmp_path / "a.zip", {"a.obj": b"x", "d/b.zip": inner})
        unpack_mesh(path, tmp_path / "out", LIMITS)
        assert not list(tmp_path.rglob("evil.obj"))
