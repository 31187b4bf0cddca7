"""Reconstruction: a mesh through the SS-VAE and back, with any checkpoint."""

import numpy as np
import pytest
import torch
import trimesh

from model.checkpoint import save_model
from model.inference.reconstruction import load_vae, read_mesh, reconstruct_mesh
from model.reconstruct import ReconstructConfig, reconstruct
from model.sparse_vae import Posterior, SparseVAE
from pipeline.core.errors import UserError
from tests.model.official.published_folder import use_tiny_refiners, write_folder
from tests.model.tiny_models import VAE, randomize

torch.set_num_threads(1)
RESOLUTION = 64


@pytest.fixture(scope="module")
def sphere(tmp_path_factory):
    path = tmp_path_factory.mktemp("meshes") / "sphere.ply"
    mesh = trimesh.creation.icosphere(subdivisions=4, radius=3.0)
    mesh.apply_translation([10, 0, -5])
    mesh.export(path)
    return path


class Identity(SparseVAE):
    """A VAE that decodes what it was given."""

    def forward(self, batch, noise_MC=None):
        none = torch.zeros(len(batch.cells), 1)
        return batch.values.float(), Posterior(none, none, batch.cells)


def test_a_perfect_vae_returns_the_mesh_in_the_frame_of_the_input(sphere):
    mesh, bricks = read_mesh(sphere, RESOLUTION)
    device = torch.device("cpu")
    made = reconstruct_mesh(Identity(VAE), mesh, bricks, device=device, samples=20_000)
    radius = np.linalg.norm(made.vertices - [10, 0, -5], axis=1)
    np.testing.assert_allclose(radius, 3.0, atol=0.02)
    assert made.tokens == len(bricks.cells)
    assert made.metrics.chamfer < 2e-3
    assert made.metrics.normal_consistency > 0.99


def test_the_command_measures_the_distance_and_writes_the_mesh(sphere, tmp_path):
    vae = randomize(SparseVAE(VAE), 1, scale=0.2)
    save_model(tmp_path / "export" / f"vae_{RESOLUTION}", vae, VAE)
    cfg = ReconstructConfig(
        mesh=sphere,
        out=tmp_path / "out.ply",
        checkpoint=str(tmp_path / "export"),
        device="cpu",
        samples=1000,
    )
    line = reconstruct(cfg)
    assert "R = 64" in line
    assert "CD x1000" in line
    assert "normal error" in line
    assert len(trimesh.load(tmp_path / "out.ply").faces)
    with pytest.raises(UserError, match="has VAEs for R = 64, none for 128"):
        load_vae(cfg.checkpoint, 128)
    with pytest.raises(UserError, match="would be replaced by its reconstruction"):
        reconstruct(ReconstructConfig(mesh=sphere, out=sphere, checkpoint=cfg.checkpoint))
    with pytest.raises(UserError, match=r"nowhere.ply is not a file"):
        reconstruct(
            ReconstructConfig(
                mesh=tmp_path / "nowhere.ply", checkpoint=cfg.checkpoint, device="cpu"
            )
        )


def test_an_official_vae_reconstructs(sphere, tmp_path, monkeypatch):
    use_tiny_refiners(monkeypatch)
    folder = write_folder(tmp_path / "published", "1.1")
    for name in ("model_dense", "model_sparse_512", "model_refiner"):
        (folder / f"{name}.ckpt").unlink()  # only the VAE's own file is read
    vae, resolution, iso_value = load_vae(str(folder), None)
    assert (resolution, iso_value) == (128, 0.2)
    mesh, bricks = read_mesh(sphere, RESOLUTION)
    with pytest.raises(UserError, match=r"model_sparse_512.ckpt is missing"):
        load_vae(str(folder), 64)
    made = reconstruct_mesh(
        vae, mesh, bricks, device=torch.device("cpu"), samples=1000, iso_value=iso_value
    )
    assert len(made.faces)
