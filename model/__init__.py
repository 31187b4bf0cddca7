"""Models and generation: sparse tensors, SS-VAE, SS-DiT, and meshes from images.

The public names are imported when they are first used, so that `import model` stays fast.
"""

from typing import TYPE_CHECKING

from kernels.runtime.lazy_exports import export_lazily

if TYPE_CHECKING:
    from model.checkpoint import load_model, save_model
    from model.conditioning.image_conditioned_dit import ConditionedDiT
    from model.conditioning.image_preprocessing import load_image, prepare_image
    from model.config import (
        ConditionedDiTConfig,
        DiTConfig,
        EncoderConfig,
        GenerationOptions,
        OccupancyConfig,
        StructureConfig,
        VAEConfig,
    )
    from model.inference.extract_mesh import extract_meshes
    from model.inference.generator import GeneratedMesh, Generator
    from model.occupancy_vae import OccupancyVAE
    from model.sparse_dit import SparseDiT
    from model.sparse_tensor import BrickBatch, Level, SparseTensor
    from model.sparse_vae import SparseVAE
    from model.structure import Structure
    from pipeline.mesh_io.mesh_export import write_mesh

__all__ = [
    "BrickBatch",
    "ConditionedDiT",
    "ConditionedDiTConfig",
    "DiTConfig",
    "EncoderConfig",
    "GeneratedMesh",
    "GenerationOptions",
    "Generator",
    "Level",
    "OccupancyConfig",
    "OccupancyVAE",
    "SparseDiT",
    "SparseTensor",
    "SparseVAE",
    "Structure",
    "StructureConfig",
    "VAEConfig",
    "extract_meshes",
    "load_image",
    "load_model",
    "prepare_image",
    "save_model",
    "write_mesh",
]

__getattr__ = export_lazily(
    __name__,
    {
        "BrickBatch": "model.sparse_tensor",
        "ConditionedDiT": "model.conditioning.image_conditioned_dit",
        "ConditionedDiTConfig": "model.config",
        "DiTConfig": "model.config",
        "EncoderConfig": "model.config",
        "GeneratedMesh": "model.inference.generator",
        "GenerationOptions": "model.config",
        "Generator": "model.inference.generator",
        "Level": "model.sparse_tensor",
        "OccupancyConfig": "model.config",
        "OccupancyVAE": "model.occupancy_vae",
        "SparseDiT": "model.sparse_dit",
        "SparseTensor": "model.sparse_tensor",
        "SparseVAE": "model.sparse_vae",
        "Structure": "model.structure",
        "StructureConfig": "model.config",
        "VAEConfig": "model.config",
        "extract_meshes": "model.inference.extract_mesh",
        "load_image": "model.conditioning.image_preprocessing",
        "load_model": "model.checkpoint",
        "prepare_image": "model.conditioning.image_preprocessing",
        "save_model": "model.checkpoint",
        "write_mesh": "pipeline.mesh_io.mesh_export",
    },
)
