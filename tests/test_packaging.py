"""What a wheel of the project contains besides code: shipped weights and the demo's pictures."""

import shutil
import zipfile
from pathlib import Path

import pytest

from model.inference.checkpoint_source import SHIPPED, SHIPPED_WEIGHTS, find_checkpoint
from model.inference.stages import exported_resolutions
from tests.child_python import ROOT, run_python
from train.demo.config import HELD_OUT_FOLDER
from train.stages.model_card import CARD

MOST_BYTES = 20e6  # of one set of shipped weights
SECTIONS = ("Use", "Stages", "Training data and licence", "Recipe", "Evaluation", "Limits")


def test_a_wheel_has_the_weights_and_the_pictures(tmp_path):
    """The wheel is built from a copy of the project's metadata with small files in place of all."""
    tree = tmp_path / "tree"
    names = ["README.md", "attribution.csv", "structure/config.json", "structure/model.safetensors"]
    files = {f"model/weights/props/{name}" for name in names}
    files |= {f"train/demo/held_out/{path.name}" for path in HELD_OUT_FOLDER.iterdir()}
    packages = {"model/__init__.py", "train/__init__.py", "train/demo/__init__.py"}
    for name in files | packages:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    run_python("-c", code, tmp_path, cwd=tree)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert files | packages <= set(archive.namelist())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_small_and_have_a_card(name):
    folder = SHIPPED_WEIGHTS / name
    if not any(folder.glob("*/config.json")):
        pytest.skip(f"the weights are not in {folder}")
    assert find_checkpoint(Path(name)) == folder
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_BYTES
    (resolution,) = exported_resolutions(folder, "dit")
    stages = {path.parent.name for path in folder.glob("*/model.safetensors")}
    assert stages == {"structure", f"dit_{resolution}", f"vae_{resolution}"}
    card = (folder / CARD).read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f"\n## {section}" in card
    assert f"--checkpoint {name} " in card
    assert "commit unknown" not in card
    assert "license: " in card
    assert (folder / "attribution.csv").exists()
