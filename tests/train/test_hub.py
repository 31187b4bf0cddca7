"""Pushing an export to a hub on this machine, and its model card."""

import pytest
import yaml

from model.checkpoint import save_model
from model.inference.generator import Generator
from pipeline.core.errors import RunError, UserError
from tests.model.test_generate import export
from tests.model.tiny_models import random_stages
from tests.train import fake_hub
from train.stages.config import ExportConfig
from train.stages.hub import model_card, push_export

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
