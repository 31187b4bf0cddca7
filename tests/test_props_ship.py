"""Shipping an export of the props recipe: what is copied, refused and written on the card."""

import json

import pytest

from examples.recipes.props import ship as recipe
from examples.recipes.props.make_list import HERE, read_rows
from examples.recipes.props.ship import attribution, main
from model.inference.stages import write_stages
from pipeline.core.errors import UserError
from tests.model.tiny_models import random_stages, stages_of
from tests.test_packaging import SECTIONS


@pytest.fixture
def words(tmp_path):
    """Return the words of the command for an export with an evaluation, and its destination."""
    export = tmp_path / "export"
    write_stages(export, stages_of(*random_stages((64,))))
    evaluation = tmp_path / "image"
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text(
        json.dumps({"protocol": {"seeds": [0, 1]}, "commit": None}), encoding="utf-8"
    )
    (evaluation / "table.md").write_text("| | CD |\n|---|---|\n| val | 1.5 |\n", encoding="utf-8")
    (export / "evaluation").mkdir()
    (export / "evaluation" / "large.glb").touch()
    return [
        *(str(export), "--evaluation", str(evaluation / "evaluation.json")),
        *("--commit", "ab12", "--out", str(tmp_path / "weights" / "props")),
    ]


def test_the_stages_are_copied_with_their_authors_and_a_complete_card(words, tmp_path):
    out = tmp_path / "weights" / "props"
    out.mkdir(parents=True)
    (out / "old").touch()
    main(words)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    stages = ("dit_64", "structure", "vae_64" if (out / "vae_64").exists() else "vae")
    files = {f"{stage}/{name}" for stage in stages for name in recipe.FILES}
    assert names == files | {"README.md", "attribution.csv"}
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert [section for section in SECTIONS if f"\n## {section}" not in card] == []
    assert "--checkpoint props " in card
    assert "license: apache-2.0" in card
    assert "| CC0-1.0 | 3523 | 78 |" in card
    assert "commit unknown" not in card
    assert list(tmp_path.glob("weights/*")) == [out]


def test_every_trained_asset_is_attributed_to_its_repository():
    rows = read_rows(HERE / "shapes.csv")
    authors = attribution(rows)
    trained = [row for row in rows if row["split"] == "train"]
    assert sum(int(row["title"].split()[0]) for row in authors) == len(trained) == 3523
    assert {row["url"].removeprefix("https://github.com/") for row in authors} == {
        row["repository"] for row in trained
    }
    assert {row["licence"] for row in authors} == {"CC0-1.0"}


def test_exports_that_cannot_be_shipped_are_refused(words, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"at most 1000 bytes, got \d+; export with --precision"):
        main(words)
    (tmp_path / "export" / "structure" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"structure/model\.safetensors is missing"):
        main(words)
    (tmp_path / "export" / "structure" / "config.json").unlink()
    with pytest.raises(
        UserError, match="must have the stages dit, structure, vae, got dit_64, vae"
    ):
        main(words)
    assert not (tmp_path / "weights").exists()
