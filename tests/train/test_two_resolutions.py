"""The whole chain at two resolutions: two SS-VAEs and two DiTs, trained, exported, generating."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.checkpoint import load_model
from model.conditioning.image_conditioned_dit import ConditionedDiT
from model.config import ConditionedDiTConfig
from model.inference.generator import Generator
from model.inference.mesh_cleaning import count_open_edges
from model.inference.stages import Stages
from model.sparse_vae import SparseVAE
from model.structure import Structure
from tests.model.tiny_models import DIT, ENCODER, FAST, STRUCTURE, disc_image
from tests.train.analytic_builds import TINY, add_renders, make_build, short_loop, tiny_training
from train.data.config import FlowOptions
from train.data.latents import vae_hash
from train.engine.distributed import World
from train.stages.config import ExportConfig
from train.stages.dit.config import DiTTraining
from train.stages.dit.run import train_dit
from train.stages.export import export
from train.stages.structure.config import FlowTraining, OccupancyTraining, StructureTraining
from train.stages.structure.run import train_structure
from train.stages.vae.config import EncodeConfig
from train.stages.vae.encode import encode
from train.stages.vae.run import train_vae

RESOLUTIONS = (32, 64)
SPARSE_DIT = replace(DIT, latent_channels=TINY.latent_channels)
# So low that a stage of four steps generates cells.
OCCUPANCY = replace(STRUCTURE.occupancy, side=4, threshold=0.02)


@pytest.mark.slow
def test_two_vaes_and_two_dits_are_trained_exported_and_generate(tmp_path):
    """Each resolution is decoded by the VAE whose latents its DiT was trained on."""
    data = make_build(tmp_path / "build", assets=4, val=0, resolutions=RESOLUTIONS)
    add_renders(data)
    loop = short_loop(steps=4, learning_rate=3e-3)
    common = {"data": data, "device": "cpu", "workers": 1, "samples": 1}
    train_structure(
        StructureTraining(
            **common,
            out=tmp_path / "structure",
            resolution=32,
            model=replace(STRUCTURE, occupancy=OCCUPANCY),
            vae=OccupancyTraining(batch_size=2, loop=loop),
            flow=FlowTraining(batch_size=2, loop=loop),
        ),
        World(),
    )
    vaes, dits = {}, {}
    for resolution in RESOLUTIONS:
        vaes[resolution] = tmp_path / f"vae-{resolution}" / "latest"
        dits[resolution] = tmp_path / f"dit-{resolution}" / "latest"
        run = vaes[resolution].parent
        cfg = tiny_training(data, run, resolutions=(resolution,), seed=resolution)
        assert train_vae(cfg, World()) == 4
        options = {"resolutions": (resolution,), "precision": "fp32", "workers": 1}
        encode(EncodeConfig(vae=vaes[resolution], data=data, device="cpu", **options), World())
        training = DiTTraining(
            **common,
            out=dits[resolution].parent,
            vae=vaes[resolution],
            resolution=resolution,
            model=ConditionedDiTConfig(dit=SPARSE_DIT, encoder=ENCODER),
            flow=FlowOptions(batch_size=2, loop=loop),
        )
        assert train_dit(training, World()) == 4
    out = tmp_path / "export"
    flow = tmp_path / "structure" / "flow" / "latest"
    export(
        ExportConfig(vae=tuple(vaes.values()), structure=flow, dit=tuple(dits.values()), out=out)
    )

    generator = Generator.load(out)
    made = generator.generate(disc_image(), 3, FAST)
    assert [stage.name for stage in made.stages] == ["structure", "32", "64"]
    assert len(made.faces)
    assert count_open_edges(made.faces) == 0
    models = {r: load_model(path, SparseVAE) for r, path in vaes.items()}
    hashes = {r: vae_hash(vae) for r, vae in models.items()}
    assert hashes[32] != hashes[64]
    assert {r: vae_hash(vae) for r, vae in generator.vaes.items()} == hashes
    stages = Stages(
        structure=load_model(flow, Structure),
        dits={r: load_model(path, ConditionedDiT) for r, path in dits.items()},
        vaes=models,
    )
    same = Generator(stages, torch.device("cpu")).generate(disc_image(), 3, FAST)
    np.testing.assert_array_equal(same.vertices, made.vertices)
    np.testing.assert_array_equal(same.faces, made.faces)
