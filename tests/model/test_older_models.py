"""Models and runs that were written before some options existed keep what the code did then."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from model.checkpoint import build_config, keep_older_values, load_model, save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import ConditionedDiTConfig, DiTConfig, OccupancyConfig, StructureConfig
from model.image_tokens import ImageTokens
from model.sparse_dit import SparseDiT
from model.sparse_tensor import SparseTensor
from pipeline.core.errors import UserError
from tests.model.test_sparse_dit import make_level
from tests.model.tiny_models import DIT, ENCODER, randomize

torch.set_num_threads(1)
# config.json of an exported DiT, as it was written before position factors, conditions and times
# were options.
OLD_DIT = {
    "channels": 32,
    "blocks": 1,
    "heads": 2,
    "kv_heads": 1,
    "mlp_ratio": 2,
    "latent_channels": 4,
    "condition_channels": 32,
    "attention": "ssa",
    "compression": "v1",
    "compress_block": 4,
    "top_k": 2,
    "shifted_windows": True,
    "plus_one_pooling": False,
}
OLD_ENCODER = {
    "kind": "stand-in",
    "weights": "facebook/dinov2-with-registers-large",
    "image_size": 28,
    "channels": 32,
    "layers": 1,
    "heads": 2,
}
OLD = {"dit": OLD_DIT, "encoder": OLD_ENCODER}
# Two rows of the velocity at R = 1024 that the code computed before the options existed.
OLD_VELOCITY = [
    [-0.608745, -0.774372, 0.637579, 0.424366],
    [-0.190299, -0.563921, 0.574744, 0.183938],
]
RESOLUTIONS = (256, 512, 1024)


def velocity(model, side):
    level = make_level([30], side, seed=3)
    generator = torch.Generator().manual_seed(5)
    feats = torch.randn(30, 4, generator=generator)
    image = ImageTokens(
        torch.randn(6, 32, generator=generator),
        torch.zeros(6, 4, dtype=torch.int32),
        torch.tensor([0, 6], dtype=torch.int32),
        6,
    )
    with torch.no_grad():
        return model(SparseTensor(feats, level), torch.tensor([0.4]), image)


def test_an_older_dit_computes_what_it_did():
    config = build_config(ConditionedDiTConfig, OLD, "old")
    torch.manual_seed(0)
    model = randomize(SparseDiT(config.dit), 1, scale=0.1)
    # max(1, 512 / R) at every resolution, projected conditions, evenly spaced times
    assert [config.dit.position_factor(R) for R in RESOLUTIONS] == [2.0, 1.0, 1.0]
    assert [DiTConfig().position_factor(R) for R in RESOLUTIONS] == [2.0, 1.0, 0.5]
    assert model.condition is not None
    assert (config.schedule.spacing, config.schedule.shift) == ("even", 1.0)
    assert config.image_tokens == "foreground"
    assert (config.encoder.precision, config.encoder.preparation) == ("bf16", "one_resize")
    new = SparseDiT(replace(config.dit, min_position_factor=0.0))
    new.load_state_dict(model.state_dict())
    assert torch.equal(velocity(model, 64), velocity(new, 64))
    assert not torch.equal(velocity(model, 128), velocity(new, 128))
    torch.testing.assert_close(
        velocity(model, 128)[:2], torch.tensor(OLD_VELOCITY), rtol=1e-4, atol=1e-5
    )


def test_an_older_export_is_loaded(tmp_path):
    config = build_config(ConditionedDiTConfig, OLD, "old")
    model = randomize(ConditionedDiT(config), 1)
    save_model(tmp_path / "dit_64", model, config)
    file = tmp_path / "dit_64" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text(encoding="utf-8")), "config": OLD}),
        encoding="utf-8",
    )
    loaded = load_model(tmp_path / "dit_64", ConditionedDiT)
    assert loaded.config == config
    broken = {key: value for key, value in OLD_DIT.items() if key != "top_k"}
    damaged = {**OLD, "dit": {**broken, "window": 8}}
    with pytest.raises(UserError, match=r"unknown: \['window'\], missing: \['top_k'\]"):
        build_config(ConditionedDiTConfig, damaged, "old")


def test_an_older_structure_stage_keeps_its_threshold_and_norm():
    old = {"side": 8, "widths": [8, 16], "blocks": 1, "groups": 8, "latent_channels": 4}
    config = build_config(OccupancyConfig, old, "old")
    assert config == OccupancyConfig(side=8, widths=(8, 16), blocks=1, groups=8, latent_channels=4)
    assert (config.threshold, config.norm, config.decoder_widths) == (0.5, "group", None)


def test_an_older_run_keeps_its_position_factor():
    new = ConditionedDiTConfig(dit=DIT, encoder=ENCODER)
    kept = keep_older_values(new, OLD)
    assert kept == build_config(ConditionedDiTConfig, OLD, "old")
    assert kept.dit.min_position_factor == 1.0
    # A run that has the field, and an option that is not the default, are left alone.
    assert keep_older_values(new, asdict(new)) == new
    chosen = replace(new, dit=replace(DIT, min_position_factor=0.25))
    assert keep_older_values(chosen, OLD).dit.min_position_factor == 0.25
    assert keep_older_values(StructureConfig(), {}).flow.dit.min_position_factor == 1.0
