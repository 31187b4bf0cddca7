"""A mesh through the SS-VAE and back: bricks, latents, decoded bricks, mesh, distances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint import CONFIG, load_model, read_config
from model.config import Precision
from model.inference.checkpoint_source import find_checkpoint
from model.inference.extract_mesh import extract_meshes
from model.inference.generator import compute_dtype
from model.inference.published_checkpoint import ISO_VALUE, is_published, read_vae
from model.inference.stages import exported_resolutions, read_meshing
from model.sparse_tensor import BrickBatch
from model.sparse_vae import SparseVAE
from pipeline.core.errors import Reject, RunError, UserError
from pipeline.core.primitives.surface_distance import SurfaceMetrics, compare_surfaces
from pipeline.core.schema import Bricks, Mesh

DEFAULT_RESOLUTION = 512  # of a VAE that does not say at which resolutions it was trained


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A reconstructed mesh.

    Attributes:
        vertices: [V, 3] in the frame of the input.
        faces: [F, 3], counterclockwise seen from outside.
        tokens: Number of latent tokens.
        metrics: Distances to the input, both scaled to the frame of the training data.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int32]
    tokens: int
    metrics: SurfaceMetrics


def load_vae(checkpoint: str, resolution: int | None) -> tuple[SparseVAE, int, float]:
    """Load the VAE of a checkpoint.

    Args:
        checkpoint: Directory of an export, of a VAE alone, or of the published weights, or a name
            on the Hugging Face hub.
        resolution: Resolution of the grid. None takes the finest one that there is a VAE for.

    Returns:
        The VAE, the resolution, and the value of the surface in its bricks.

    Raises:
        UserError: If there is no such VAE.
    """
    path = find_checkpoint(checkpoint, "none")
    if is_published(path):
        return (*read_vae(path, resolution), ISO_VALUE)
    if (path / CONFIG).exists():
        trained_at = (read_config(path).get("training") or {}).get("bricks", {})
        known = trained_at.get("resolutions") or [DEFAULT_RESOLUTION]
        return load_model(path, SparseVAE), resolution or max(known), 0.0
    folders = exported_resolutions(path, "vae")
    sizes = exported_resolutions(path, "dit")
    if (path / "vae").is_dir():  # an older export with one VAE for all resolutions
        folders = {size: path / "vae" for size in (sizes or [DEFAULT_RESOLUTION])} | folders
    if not folders:
        raise UserError(f"{path} holds no VAE; export one with python -m train.export --vae")
    size = resolution or max(folders)
    if size not in folders:
        raise UserError(
            f"{path} has VAEs for R = {', '.join(map(str, sorted(folders)))}, none for {size}"
        )
    iso_value = read_meshing(sizes[size]).iso_value if size in sizes else 0.0
    return load_model(folders[size], SparseVAE), size, iso_value


def read_mesh(path: Path, resolution: int) -> tuple[Mesh, Bricks]:
    """Read a mesh as the data pipeline does.

    Args:
        path: Mesh file.
        resolution: Resolution R of the SDF.

    Returns:
        The mesh in the frame of the training data, and its bricks.

    Raises:
        UserError: If the file cannot be read or has no usable surface.
    """
    try:
        from pipeline.geometry.config import TopologyConfig
        from pipeline.geometry.sdf import compute_bricks
        from pipeline.geometry.topology import build_topology
        from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
        from pipeline.mesh_io.load import load
        from pipeline.mesh_io.normalize import normalize
    except ImportError as error:
        raise UserError(
            f'reading meshes needs the data pipeline ({error}): pip install -e ".[pipeline]"'
        ) from error
    if not path.is_file():
        raise UserError(f"{path} is not a file; name a mesh file")
    try:
        mesh = normalize(load(path, LoadConfig()), NormalizeConfig())
        topology = build_topology(mesh, TopologyConfig(resolution=max(64, min(resolution, 512))))
        return mesh, compute_bricks(topology, resolution)
    except Reject as verdict:
        raise UserError(f"{path} has no usable surface: {verdict}") from verdict
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


@torch.no_grad()
def reconstruct_mesh(
    vae: SparseVAE,
    mesh: Mesh,
    bricks: Bricks,
    *,
    device: torch.device,
    precision: Precision = "auto",
    samples: int = 200_000,
    iso_value: float = 0.0,
) -> Reconstruction:
    """Encode bricks to the means of their latents, decode them, and compare the surfaces.

    Args:
        vae: The VAE.
        mesh: The input, in the frame of the training data.
        bricks: Its bricks.
        device: Where the VAE runs.
        precision: Precision of matrix products.
        samples: Points sampled on each surface.
        iso_value: Value of the surface in the decoded bricks.

    Raises:
        RunError: If the decoded bricks have no surface.
    """
    dtype = compute_dtype(precision, device)
    enabled = dtype != torch.float32
    batch = BrickBatch.collate([bricks]).to(device)
    with torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled):
        values, _ = vae.to(device).eval()(batch)
    ((vertices, faces),) = extract_meshes(batch.cells, values, iso_value)
    if not len(faces):
        raise RunError(f"the decoded bricks at R = {bricks.resolution} have no surface")
    metrics = compare_surfaces(vertices, faces, mesh.vertices, mesh.faces, samples=samples)
    placed = vertices / mesh.scale + np.asarray(mesh.center)
    return Reconstruction(vertices=placed, faces=faces, tokens=len(batch.cells), metrics=metrics)
