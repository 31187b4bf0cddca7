"""--init refuses weights that were trained with another position factor, unless it is asked for."""

import json
from dataclasses import replace

import pytest

from model.config import ConditionedDiTConfig, DiTConfig
from pipeline.core.errors import UserError
from pipeline.core.provenance import FORMAT_VERSION
from tests.model.test_older_models import OLD
from train.stages.dit.config import DiTTraining
from train.stages.dit.run import check_init_positions

NEW = ConditionedDiTConfig()


def checkpoint(path, resolution):
    path.mkdir()
    content = {
        "format_version": FORMAT_VERSION,
        "config": OLD,
        "training": {"resolution": resolution},
    }
    (path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_older_weights_start_a_run_whose_factor_was_the_same(tmp_path):
    cfg = DiTTraining(resolution=1024, model=NEW)
    # At 512 and below, max(1, 512 / R) is 512 / R.
    for resolution in (256, 512):
        check_init_positions(cfg, checkpoint(tmp_path / str(resolution), resolution))


def test_older_weights_of_1024_are_refused_unless_asked_for(tmp_path):
    init = checkpoint(tmp_path / "old", 1024)
    cfg = DiTTraining(resolution=1024, model=NEW)
    with pytest.raises(UserError, match=r"with the position factor 1, which would now be 0\.5"):
        check_init_positions(cfg, init)
    check_init_positions(replace(cfg, init_any_positions=True), init)
    same = replace(NEW, dit=DiTConfig(min_position_factor=1.0))
    check_init_positions(replace(cfg, model=same), init)
