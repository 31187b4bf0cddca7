"""--init: every stage of an export starts a run of its kind and resolution, and nothing else."""

import json
from dataclasses import replace

import pytest
import torch

from model.checkpoint import save_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.occupancy_vae import OccupancyVAE
from model.sparse_vae import SparseVAE
from model.structure import Structure
from pipeline.core.errors import UserError
from tests.model.tiny_models import DIT, OCCUPANCY, VAE, random_stages, randomize
from train.stages.initial_weights import find_init, load_init


@pytest.fixture(scope="module")
def stages():
    return random_stages()


@pytest.fixture
def export(stages, tmp_path):
    vae, structure, dits = stages
    models = {"vae_64": vae, "vae_128": vae, "structure": structure}
    models |= {f"dit_{size}": dit for size, dit in dits.items()}
    for name, model in models.items():
        save_model(tmp_path / "export" / name, model, model.config)
    return tmp_path / "export"


def find(init, tmp_path, stage, model, *resolutions):
    return find_init(init, tmp_path / "out", stage, (model.__name__,), resolutions)


def same_weights(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_each_stage_of_an_export_starts_a_run_of_its_kind(export, stages, tmp_path):
    vae, structure, dits = stages
    for kind, expected, resolutions in (
        ("vae", vae, (64, 128)),
        ("structure", structure, ()),
        ("dit", dits[64], (64,)),
        ("dit", dits[128], (128,)),
    ):
        model = type(expected)(expected.config)
        path = find(export, tmp_path, kind, type(model), *resolutions)
        assert path is not None
        load_init(path, model)
        assert same_weights(model, expected)
    part = OccupancyVAE(OCCUPANCY)
    load_init(export / "structure", part)
    assert same_weights(part, structure.vae)


def test_one_stage_of_an_export_may_start_a_run_of_another_resolution(export, tmp_path):
    path = find(export / "dit_64", tmp_path, "dit", ConditionedDiT, 128)
    assert path == export / "dit_64"


def test_shipped_weights_are_found_by_their_name(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("model.inference.checkpoint_source.SHIPPED_WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    export.rename(tmp_path / "weights" / "props")
    shipped = tmp_path / "weights" / "props" / "dit_64"
    name = type(tmp_path)("props")
    assert find(name, tmp_path, "dit", ConditionedDiT, 64) == shipped


def test_a_resumed_run_does_not_look_at_init(export, tmp_path):
    assert find(None, tmp_path, "dit", ConditionedDiT, 64) is None
    step = tmp_path / "out" / "step-00000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}", encoding="utf-8")
    (step / "config.json").write_text(
        (export / "dit_64" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    assert find(tmp_path / "nowhere", tmp_path, "dit", ConditionedDiT, 64) is None


@pytest.mark.parametrize(
    ("init", "stage", "model", "resolutions", "message"),
    [
        ("nowhere", "dit", ConditionedDiT, (64,), "nowhere does not exist; train it first, or"),
        ("export", "dit", ConditionedDiT, (512,), r"has no dit of R = 512; .*dit_64, .*dit_128"),
        ("export", "vae", SparseVAE, (64, 256), "has no vae of R = 256"),
        ("export/dit_64", "vae", SparseVAE, (64,), "holds a ConditionedDiT .* trains a SparseVAE"),
        ("export/vae_64", "structure", Structure, (), "holds a SparseVAE .* trains a Structure"),
        (".", "structure", Structure, (), "neither a checkpoint nor an export with a stage struct"),
    ],
)
def test_weights_that_cannot_start_a_run_give_one_line(
    export, tmp_path, init, stage, model, resolutions, message
):
    with pytest.raises(UserError, match=message) as error:
        find(tmp_path / init, tmp_path, stage, model, *resolutions)
    assert "\n" not in str(error.value)


def test_different_vaes_do_not_start_one_run(export, stages, tmp_path):
    save_model(export / "vae_128", randomize(SparseVAE(VAE), 9), VAE)
    with pytest.raises(UserError, match=r"vae_64 and .*vae_128 are different VAEs"):
        find(export, tmp_path, "vae", SparseVAE, 64, 128)
    assert find(export, tmp_path, "vae", SparseVAE, 128) == export / "vae_128"


def test_weights_of_other_shapes_give_one_line_and_change_nothing(export, stages):
    config = stages[2][64].config
    wider = replace(config, dit=replace(DIT, mlp_ratio=4))
    model = ConditionedDiT(wider)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = r"dit_64/model\.safetensors cannot be used with --init: .*mlp.* does not fit .*--model"
    with pytest.raises(UserError, match=wanted) as error:
        load_init(export / "dit_64", model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    damaged = export / "dit_64" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be used with --init"):
        load_init(export / "dit_64", model)


def test_a_folder_that_is_no_checkpoint_is_named(export, tmp_path):
    (export / "dit_64" / "config.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(UserError, match="dit_64 is not a checkpoint"):
        find(export, tmp_path, "dit", ConditionedDiT, 64)
