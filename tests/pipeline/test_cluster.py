"""cluster.yaml is valid for Ray and installs what the project needs on a node."""

import copy
import shutil
import subprocess

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.child_python import ROOT

CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_the_file_with_its_defaults_filled_in():
    filled = prepare_config(copy.deepcopy(CONFIG))
    validate_config(filled)
    assert set(filled["available_node_types"]) == {"head", "cpu_worker", "gpu_worker"}


def test_a_misspelt_key_would_be_found():
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(CONFIG), "setup_comands": []}))


def test_every_node_installs_the_project_and_starts_ray_from_it():
    assert any("make setup" in command for command in CONFIG["setup_commands"])
    (mounted,) = CONFIG["file_mounts"]
    name = mounted.rpartition("/")[2]
    for start in (*CONFIG["head_start_ray_commands"], *CONFIG["worker_start_ray_commands"]):
        assert start.startswith(f". ~/{name}/.venv/bin/activate && ")


def test_system_packages_are_those_of_the_makefile():
    shown = subprocess.run(
        [shutil.which("make") or "make", "--no-print-directory", "-f", "-", "show"],
        input="include Makefile\nshow:\n\t@echo $(APT_PACKAGES)\n",
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    installed = " ".join(CONFIG["setup_commands"]).split()
    assert set(shown.stdout.split()) <= set(installed)


def test_the_head_processes_no_assets():
    assert CONFIG["available_node_types"][CONFIG["head_node_type"]]["resources"]["CPU"] == 0
