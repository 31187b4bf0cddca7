"""Pushing an export to a hub on this machine, and its model card."""

import json
from dataclasses import replace

import pytest
import yaml

from model.checkpoint import save_model
from model.inference.generator import Generator
from pipeline.core.errors import RunError, UserError
from tests.model.test_generate import export
from tests.model.tiny_models import random_stages
from tests.train import fake_hub
from train.export import main
from train.stages import model_card as card_module
from train.stages.config import CardOptions, ExportConfig
from train.stages.hub import push_export
from train.stages.model_card import model_card

CHECKPOINT_FILES = ("config.json", "model.safetensors")


@pytest.fixture
def online(monkeypatch):
    """Let the library talk to the hub of the test."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Large files go through the plain protocol, which the hub of the test speaks.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)


@pytest.fixture
def exported(tmp_path):
    folder = export(tmp_path / "export")
    vae, _, _ = random_stages()
    save_model(folder / "vae", vae, vae.config, recommended={"steps": 9})
    (folder / "notes.txt").write_text("not for the hub", encoding="utf-8")
    return folder


def test_a_pushed_export_is_the_one_that_generates(exported, online, tmp_path):
    with fake_hub.running() as hub:
        url = push_export(
            exported, "ada/chairs", licence="apache-2.0", private=True, endpoint=hub.url
        )
        assert url == f"{hub.url}/ada/chairs/commit/1"
        (wanted,) = hub.created
        # Versions of the library state it in one of two ways.
        assert wanted.get("private") is True or wanted.get("visibility") == "private"
        files = hub.files["ada/chairs"]
    stages = ("vae", "structure", "dit_64", "dit_128")
    expected = {f"{stage}/{file}" for stage in stages for file in CHECKPOINT_FILES}
    assert set(files) == {"README.md", *expected}
    copy = tmp_path / "copy"
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
        assert name == "README.md" or content == (exported / name).read_bytes()
    assert Generator.load(copy).resolutions == [64, 128]


def test_the_model_card_describes_the_stages_and_how_to_use_them(exported):
    card = model_card(exported, "ada/chairs", "cc-by-4.0")
    _, metadata, text = card.split("---\n", 2)
    described = yaml.safe_load(metadata)
    assert described["license"] == "cc-by-4.0"
    assert described["pipeline_tag"] == "image-to-3d"
    assert "--checkpoint hf://ada/chairs" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["dit_128", "dit_64", "structure", "vae"]
    vae, _, _ = random_stages()
    count = sum(tensor.numel() for tensor in vae.state_dict().values())
    assert rows[3][1].strip() == "SparseVAE"
    assert float(rows[3][2].split()[0]) == pytest.approx(count / 1e6, abs=0.01)
    assert rows[3][3].strip() == "steps 9"
    assert "does not list the assets" in text
    (exported / "attribution.csv").write_text("uid\n", encoding="utf-8")
    unlicensed = model_card(exported, "ada/chairs", None)
    assert "names the authors" in unlicensed
    assert "license:" not in unlicensed


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    protocol = {"samples": 200, "cells": "stored", "seeds": [0, 1], "sampling": {"steps": [2]}}
    (folder / "evaluation.json").write_text(
        json.dumps({"protocol": protocol, "commit": "ab12"}), encoding="utf-8"
    )
    (folder / "table.md").write_text("| | CD |\n|---|---|\n| val | 1.5 |\n", encoding="utf-8")
    texts = {
        "list.csv": "file,licence,split\na,CC0-1.0,train\nb,CC0-1.0,val\nc,CC-BY-4.0,train\n",
        "train.sh": "python -m train.vae\n",
        "limits.md": "It knows only chairs.\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return CardOptions(
        evaluation=(folder / "evaluation.json",),
        assets=tmp_path / "list.csv",
        recipe=tmp_path / "train.sh",
        limits=tmp_path / "limits.md",
    )


def test_every_section_of_the_model_card_has_a_source(exported, sources, monkeypatch):
    monkeypatch.setattr(card_module, "commit_of_code", lambda: "cd34")
    card = model_card(exported, "ada/chairs", "cc0-1.0", sources)
    start = card.index("## Training data")
    assert (
        card[start:]
        == """\
## Training data and licence

The export does not list the assets that it was trained on.

Number of assets of the list `list.csv` by licence and split:

| licence | train | val |
|---|---:|---:|
| CC-BY-4.0 | 1 | 0 |
| CC0-1.0 | 1 | 1 |

The weights are licensed under cc0-1.0.

Exported with the code of commit cd34.

## Recipe

`train.sh`:

```sh
python -m train.vae
```

## Evaluation: image

| | CD |
|---|---|
| val | 1.5 |

Measured by `python -m train.evaluate` with the code of commit ab12: samples 200, cells stored, \
seeds 0 1.

## Limits

It knows only chairs.
"""
    )
    plain = model_card(exported, "ada/chairs", None)
    assert [line for line in plain.splitlines() if line.startswith("## ")] == [
        "## Use",
        "## Stages",
        "## Training data and licence",
    ]


def test_a_card_of_shipped_weights_has_their_name_and_the_commit_of_the_training(
    exported, sources, monkeypatch
):
    monkeypatch.setattr(card_module, "commit_of_code", lambda: "cd34")
    path = sources.evaluation[0]
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "commit": None}), encoding="utf-8")
    assert "commit unknown:" in model_card(exported, None, None, sources)
    named = replace(sources, name="chairs", commit="ef56")
    card = model_card(exported, None, "cc0-1.0", named)
    assert "\n# chairs\n" in card
    assert "python -m model.app --checkpoint chairs\n" in card
    assert card.count("commit ef56") == 2
    assert "cd34" not in card


def test_a_source_of_the_model_card_that_cannot_be_used_is_refused(exported, sources, tmp_path):
    list_without_licence = tmp_path / "plain.csv"
    list_without_licence.write_text("file,split\na,train\n", encoding="utf-8")
    no_rows = tmp_path / "empty.csv"
    no_rows.write_text("licence,split\n", encoding="utf-8")
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    for changed, message in (
        ({"assets": list_without_licence}, r"plain\.csv must be a CSV file .*; it lacks licence"),
        ({"assets": no_rows}, r"empty\.csv lists no asset"),
        ({"evaluation": (other,)}, r"other\.json must be the evaluation\.json .*KeyError"),
        ({"limits": tmp_path / "none.md"}, r"none\.md cannot be read for the model card"),
    ):
        with pytest.raises(UserError, match=message):
            model_card(exported, None, None, replace(sources, **changed))
    sources.evaluation[0].with_name("table.md").unlink()
    with pytest.raises(UserError, match=r"table\.md cannot be read"):
        model_card(exported, None, None, sources)


@pytest.mark.parametrize("with_limits", [False, True])
def test_a_card_without_a_push_names_the_directory(sources, tmp_path, with_limits):
    vae, _, _ = random_stages()
    training = {"bricks": {"resolutions": [64]}}
    save_model(tmp_path / "vae", vae, vae.config, training=training)
    out = tmp_path / "export"
    words = ["--vae", str(tmp_path / "vae"), "--structure", "None", "--dit", "--out", str(out)]
    main(words)
    assert not (out / "README.md").exists()
    main([*words, *(["--card.limits", str(sources.limits)] if with_limits else ["--card.write"])])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"python -m model.generate chair.png --checkpoint {out} -o chair.glb" in card
    assert card.endswith("## Limits\n\nIt knows only chairs.\n") is with_limits


def test_a_refused_or_unreachable_hub_is_one_line(exported, online, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with fake_hub.running() as hub:
        with pytest.raises(UserError, match=r"ada/chairs cannot be pushed to .*hf auth login"):
            push_export(exported, "ada/chairs", endpoint=hub.url)
        assert hub.files == {}
    with pytest.raises(RunError, match=r"hub cannot be reached .* run the same command again"):
        push_export(exported, "ada/chairs", endpoint="http://127.0.0.1:9")


def test_the_repository_is_checked_with_the_options(tmp_path):
    assert ExportConfig(push="ada/chairs").push == "ada/chairs"
    for name in ("chairs", "a/b/c", "https://huggingface.co/a/b", ""):
        with pytest.raises(ValueError, match="push must be OWNER/NAME"):
            ExportConfig(push=name)
    with pytest.raises(UserError, match="holds no exported stage"):
        model_card(tmp_path, "ada/chairs", None)
