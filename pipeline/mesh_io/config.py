"""Options of reading and normalising meshes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.options import added


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Limits that apply while a mesh file is read."""

    max_faces: int = 4_000_000
    """Largest number of triangles of an asset after all instances of a scene are expanded. Most
    formats are checked before they are parsed, which bounds the memory of a worker. The limit
    --filter.max-faces applies after loading and should not be higher than this one."""

    max_instances: int = 20_000
    """Largest number of placements of geometry in a scene."""

    max_unpacked_bytes: int = 1 << 30
    """Largest size in bytes of the unpacked contents of a zipped format (3mf, zae, usdz), of all
    layers of a USD file, of the compressed arrays of an FBX file, of a compressed blend file and
    the libraries that it links, or of the buffers that a glTF file compresses with meshopt.
    Contents of more than 64 MiB in a zipped format must also be at most 200 times as large as the
    file."""

    max_texture_side: int = 4096
    """Largest side of a texture in pixels. Larger textures are scaled down to it. Reduce it to save
    memory if the renders are small."""

    blender: str = added("", before="")
    """Path of Blender, or of a Python interpreter with the package bpy, which reads blend and abc
    files. It runs in the process of the asset with the limits of that, without the scripts of the
    file. Empty rejects these files as missing_blender. The path is part of the identity of the
    products."""


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """Position and size of a mesh in the cube [-0.5, 0.5]^3."""

    half_extent: float = 0.475
    """Largest absolute coordinate of a normalised mesh, above 0 and at most 0.5. 0.5 touches the
    walls of the cube and leaves no margin for the SDF band."""

    def __post_init__(self):
        if not 0 < self.half_extent <= 0.5:
            raise ValueError(f"half_extent must be in (0, 0.5], got {self.half_extent}")
