"""Collecting the files of the props recipe: by hash, from clones or from a site."""

import hashlib
import subprocess

import pytest

from examples.recipes.props import collect as recipe
from examples.recipes.props.collect import clone, collect
from pipeline.core.errors import RunError, UserError

TEXTS = {"gltf/a.gltf": "A", "gltf/sub/b.gltf": "B", "gltf/a.bin": "buffer"}


def listed(name, text, repository="ada/pack"):
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"file": f"local/{name}", "repository": repository, "sha256": digest}


ROWS = [listed("gltf/a.gltf", "A"), listed("gltf/sub/b.gltf", "B")]


def write(root, texts):
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_files_are_found_by_their_hashes_and_copied_with_what_lies_beside_them(tmp_path):
    # An older version lies in the same repository, and first in its order.
    write(tmp_path / "ada" / "pack" / "addons" / "v1", {**TEXTS, "gltf/a.gltf": "old"})
    write(tmp_path / "ada" / "pack" / "addons" / "v2", TEXTS)
    assert collect(tmp_path, tmp_path / "out", ROWS) == 2
    found = {
        path.relative_to(tmp_path / "out" / "local").as_posix(): path.read_text(encoding="utf-8")
        for path in (tmp_path / "out").rglob("*.*")
    }
    assert found == TEXTS


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"gltf/a.gltf": "other", "gltf/sub/b.gltf": "B"}, "1 files of .*v1 differ or are missing"),
        ({"gltf/a.gltf": "A"}, r"such as gltf/sub/b\.gltf; check out an older commit"),
        ({"obj/a.obj": "A"}, r"must hold the 2 listed files .* gltf/a\.gltf is nowhere in it"),
    ],
)
def test_a_clone_with_other_files_is_refused(tmp_path, texts, message):
    write(tmp_path / "ada" / "pack" / "v1", texts)
    with pytest.raises(UserError, match=message):
        collect(tmp_path, tmp_path / "out", ROWS)
    assert not (tmp_path / "out").exists()


def commit(origin):
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "x")):
        subprocess.run(["git", "-C", str(origin), *words], check=True)


def test_bare_clones_are_unpacked_and_assets_that_are_not_listed_are_left_out(tmp_path):
    origin = write(tmp_path / "origin", {f"addons/{k}": v for k, v in TEXTS.items()})
    write(origin / "addons", {"gltf/sub/c.gltf": "not listed", "gltf/sub/c.png": "texture"})
    commit(origin)
    bare = tmp_path / "ada" / "pack"
    subprocess.run(["git", "clone", "-q", "--bare", str(origin), str(bare)], check=True)
    before = sorted(bare.rglob("*"))
    assert collect(tmp_path, tmp_path / "out", ROWS) == 2
    found = {
        path.relative_to(tmp_path / "out" / "local").as_posix(): path.read_text(encoding="utf-8")
        for path in (tmp_path / "out").rglob("*.*")
    }
    assert found == {**TEXTS, "gltf/sub/c.png": "texture"}
    assert sorted(bare.rglob("*")) == before


def test_contents_that_a_bare_clone_lacks_are_named_or_refused(tmp_path, caplog):
    origin = write(tmp_path / "origin", {**TEXTS, "video.mp4": "large"})
    commit(origin)
    bare = tmp_path / "ada" / "pack"
    subprocess.run(["git", "clone", "-q", "--bare", str(origin), str(bare)], check=True)

    def forget(path):
        words = ["git", "-C", str(bare), "rev-parse", f"HEAD:{path}"]
        digest = subprocess.run(
            words, capture_output=True, check=True, text=True, encoding="utf-8"
        ).stdout.strip()
        (bare / "objects" / digest[:2] / digest[2:]).unlink()

    forget("video.mp4")
    assert collect(tmp_path, tmp_path / "out", ROWS) == 2
    assert "pack lacks the contents of 1 files, such as video.mp4." in caplog.text
    forget("gltf/a.gltf")
    with pytest.raises(UserError, match=r"gltf/a\.gltf is nowhere in it"):
        collect(tmp_path, tmp_path / "out", ROWS)


def test_a_bare_clone_without_a_commit_is_refused(tmp_path):
    bare = tmp_path / "ada" / "pack"
    subprocess.run(["git", "init", "-q", "--bare", str(bare)], check=True)
    with pytest.raises(RunError, match=r"pack cannot be read \(fatal: Not a valid object name"):
        collect(tmp_path, tmp_path / "out", ROWS)


def test_missing_repositories_are_cloned(tmp_path, monkeypatch):
    origin = write(tmp_path / "site" / "ada" / "pack", TEXTS)
    commit(origin)
    site = f"file://{tmp_path / 'site'}"
    monkeypatch.setattr(recipe, "clone", lambda name, folder: clone(name, folder, site))
    assert collect(tmp_path / "clones", tmp_path / "out", ROWS) == 2
    assert (tmp_path / "out" / "local" / "gltf" / "a.bin").exists()
    with pytest.raises(RunError, match=r"ada/none cannot be cloned .*; put a copy at .*none"):
        clone("ada/none", tmp_path / "none", site)
