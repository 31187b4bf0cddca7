"""Convert the appearance of a parsed geometry: materials, textures, coordinates and colours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.color import linear_to_srgb, srgb_to_linear
from pipeline.core.schema import Material

# What Pillow raises on a damaged image.
IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    Image.DecompressionBombError,
)


class Appearance(NamedTuple):
    """Appearance of one geometry with V vertices and F faces."""

    material: Material
    uv: NDArray[np.float32] | None = None  # [V, 2]
    vertex_colors: NDArray[np.uint8] | None = None  # [V, 4] sRGB
    face_colors: NDArray[np.uint8] | None = None  # [F, 4] sRGB


class MaterialConverter:
    """Converts the materials of one file.

    Each material is converted once, so equal materials of a file are the same object.

    Args:
        max_texture_side: Largest side of a texture in pixels. Larger ones are scaled down.
        linear_colors: Whether vertex and face colours are linear light, as in glTF, or sRGB.
    """

    def __init__(self, max_texture_side: int, *, linear_colors: bool):
        self.max_texture_side = max_texture_side
        self.linear_colors = linear_colors
        self.warnings: list[str] = []
        self._default = Material()
        self._white = Material(base_color=(1.0, 1.0, 1.0, 1.0))
        self._materials: dict[int, Material] = {}
        self._textures: dict[int, NDArray[np.uint8] | None] = {}
        # References to the converted objects: their ids, which are keys, must stay unique.
        self._converted: list[Any] = []

    def convert(self, geometry: trimesh.Trimesh) -> Appearance:
        """Return the appearance of a geometry. Problems are added to `warnings`."""
        visual: Any = geometry.visual
        count = len(geometry.vertices)
        if isinstance(visual, trimesh.visual.TextureVisuals):
            material = self._material(visual.material)
            uv = None if visual.uv is None else np.asarray(visual.uv, dtype=np.float32)
            if uv is not None and (uv.ndim != 2 or len(uv) != count or uv.shape[1] < 2):
                uv = None
                self.warnings.append("texture coordinates do not match the vertices")
            colors = self._colors(visual.vertex_attributes.get("color"), count)
            return Appearance(material, None if uv is None else np.nan_to_num(uv[:, :2]), colors)
        if visual.kind == "vertex":
            return Appearance(self._white, vertex_colors=self._colors(visual.vertex_colors, count))
        if visual.kind == "face":
            face_colors = self._colors(visual.face_colors, len(geometry.faces))
            return Appearance(self._white, face_colors=face_colors)
        return Appearance(self._default)

    def _colors(self, colors: Any, count: int) -> NDArray[np.uint8] | None:
        """Return colours as sRGB, uint8 [count, 4], or None if there are none of this shape."""
        if colors is None or len(colors) != count:
            return None
        if np.ndim(colors) != 2 or np.shape(colors)[1] not in (3, 4):
            return None
        rgba = trimesh.visual.color.to_rgba(np.array(colors))
        if self.linear_colors:
            srgb = linear_to_srgb(rgba[:, :3].astype(np.float64) / 255)
            rgba = np.column_stack([np.rint(srgb * 255).astype(np.uint8), rgba[:, 3]])
        return rgba.astype(np.uint8)

    def _material(self, source: Any) -> Material:
        if id(source) not in self._materials:
            self._converted.append(source)
            is_pbr = isinstance(source, trimesh.visual.material.PBRMaterial)
            convert = self._from_pbr if is_pbr else self._from_simple
            self._materials[id(source)] = convert(source)
        return self._materials[id(source)]

    def _from_pbr(self, source: Any) -> Material:
        """Convert a glTF metallic-roughness material."""
        factor = source.baseColorFactor
        color = (
            [1.0] * 4 if factor is None else (np.asarray(factor, dtype=np.float64) / 255).tolist()
        )
        metallic = 1.0 if source.metallicFactor is None else float(source.metallicFactor)
        roughness = 1.0 if source.roughnessFactor is None else float(source.roughnessFactor)
        image = self._texture(source.metallicRoughnessTexture)
        if image is not None:  # the renderer uses one value per material: the mean of the texture
            roughness *= float(image[..., 1].mean()) / 255
            metallic *= float(image[..., 2].mean()) / 255
        return Material(
            base_color=(color[0], color[1], color[2], color[3]),
            texture=self._texture(source.baseColorTexture),
            metallic=metallic,
            roughness=roughness,
            alpha_mode=source.alphaMode or "OPAQUE",
            alpha_cutoff=0.5 if source.alphaCutoff is None else source.alphaCutoff,
            double_sided=bool(source.doubleSided),
        )

    def _from_simple(self, source: Any) -> Material:
        """Convert an OBJ or PLY material. A texture replaces the diffuse colour, which is sRGB."""
        texture = self._texture(getattr(source, "image", None))
        if texture is not None and texture.shape[:2] == (2, 2) and (texture == texture[0, 0]).all():
            return self._default  # the parser's placeholder for a missing material
        if texture is not None:
            return Material(base_color=(1.0, 1.0, 1.0, 1.0), texture=texture)
        diffuse = getattr(source, "diffuse", None)
        if diffuse is None or np.array_equal(diffuse, trimesh.visual.color.DEFAULT_COLOR):
            return self._default
        color = np.asarray(diffuse, dtype=np.float64) / 255
        return Material(base_color=(*srgb_to_linear(color[:3]).tolist(), 1.0))

    def _texture(self, image: Any) -> NDArray[np.uint8] | None:
        """Return an image as uint8 [h, w, 4] sRGB. A damaged image is a warning and gives None."""
        if image is None:
            return None
        if id(image) not in self._textures:
            self._converted.append(image)
            try:
                rgba = image.convert("RGBA")
                side = max(image.size)
                if side > self.max_texture_side:
                    scale = self.max_texture_side / side
                    size = tuple(max(1, round(n * scale)) for n in image.size)
                    rgba = rgba.resize(size, Image.Resampling.BOX)
                self._textures[id(image)] = np.asarray(rgba, dtype=np.uint8)
            except IMAGE_ERRORS as error:
                self.warnings.append(
                    f"texture unreadable: {type(error).__name__} {str(error)[:100]}"
                )
                self._textures[id(image)] = None
        return self._textures[id(image)]
