"""Turn a loaded geometry's visuals into our materials: factors, textures, texture coordinates and colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.schema import Material

IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    Image.DecompressionBombError,
)


def srgb_to_linear(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sRGB transfer function undone: [0, 1] -> [0, 1], any shape."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sRGB transfer function: [0, 1] -> [0, 1], any shape."""
    return np.where(
        values <= 0.0031308,
        values * 12.92,
        1.055 * np.maximum(values, 0.0031308) ** (1 / 2.4) - 0.055,
    )


class Looks:
    """Materials of one file, each converted once, so that parts can be told apart by identity."""

    def __init__(self, max_texture_side: int, *, linear_colors: bool):
        self.max_texture_side, self.linear_colors = max_texture_side, linear_colors
        self.warnings: list[str] = []
        self._plain = Material()
        self._white = Material(base_color=(1.0, 1.0, 1.0, 1.0))
        self._materials: dict[int, Material] = {}
        self._textures: dict[int, NDArray[np.uint8] | None] = {}
        self._alive: list[Any] = []  # ids stay unique while their objects live

    def of(self, geometry: trimesh.Trimesh) -> tuple[Material, Any, Any, Any]:
        """(material, uv [V, 2] or None, vertex colours u8 [V, 4] sRGB or None, face colours u8 [F, 4] or None)."""
        visual: Any = geometry.visual
        count = len(geometry.vertices)
        if isinstance(visual, trimesh.visual.TextureVisuals):
            material = self._material(visual.material)
            uv = None if visual.uv is None else np.asarray(visual.uv, dtype=np.float32)
            if uv is not None and (uv.ndim != 2 or len(uv) != count or uv.shape[1] < 2):
                uv = None
                self.warnings.append("texture coordinates do not match the vertices")
            colors = self._colors(visual.vertex_attributes.get("color"), count)
            return material, None if uv is None else np.nan_to_num(uv[:, :2]), colors, None
        if visual.kind == "vertex":
            return self._white, None, self._colors(visual.vertex_colors, count), None
        if visual.kind == "face":
            return self._white, None, None, self._colors(visual.face_colors, len(geometry.faces))
        return self._plain, None, None, None

    def _colors(self, colors: Any, count: int) -> NDArray[np.uint8] | None:
        if (
            colors is None
            or len(colors) != count
            or np.ndim(colors) != 2
            or np.shape(colors)[1] not in (3, 4)
        ):
            return None
        rgba = trimesh.visual.color.to_rgba(np.array(colors))
        if self.linear_colors:  # glTF alone stores light, all others store what is shown
            shown = linear_to_srgb(rgba[:, :3].astype(np.float64) / 255)
            rgba = np.column_stack([np.rint(shown * 255).astype(np.uint8), rgba[:, 3]])
        return rgba.astype(np.uint8)

    def _material(self, source: Any) -> Material:
        if id(source) not in self._materials:
            self._alive.append(source)
            convert = (
                self._from_pbr
                if isinstance(source, trimesh.visual.material.PBRMaterial)
                else self._from_simple
            )
            self._materials[id(source)] = convert(source)
        return self._materials[id(source)]

    def _from_pbr(self, source: Any) -> Material:
        factor = source.baseColorFactor
        color = (
            [1.0] * 4 if factor is None else (np.asarray(factor, dtype=np.float64) / 255).tolist()
        )
        metallic = 1.0 if source.metallicFactor is None else float(source.metallicFactor)
        roughness = 1.0 if source.roughnessFactor is None else float(source.roughnessFactor)
        image = self._texture(source.metallicRoughnessTexture)
        if image is not None:  # one number a material is enough for our lights
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
        """An OBJ or PLY material: a texture replaces the diffuse colour, which is meant as it looks (sRGB)."""
        texture = self._texture(getattr(source, "image", None))
        if texture is not None and texture.shape[:2] == (2, 2) and (texture == texture[0, 0]).all():
            return self._plain  # the parser's stand-in for a material that is not there
        if texture is not None:
            return Material(base_color=(1.0, 1.0, 1.0, 1.0), texture=texture)
        diffuse = getattr(source, "diffuse", None)
        if diffuse is None or np.array_equal(diffuse, trimesh.visual.color.DEFAULT_COLOR):
            return self._plain
        color = np.asarray(diffuse, dtype=np.float64) / 255
        return Material(base_color=(*srgb_to_linear(color[:3]).tolist(), 1.0))

    def _texture(self, image: Any) -> NDArray[np.uint8] | None:
        """u8 [h, w, 4] sRGB or None; a broken image is a warning, not the end of an asset."""
        if image is None:
            return None
        if id(image) not in self._textures:
            self._alive.append(image)
            try:
                side = max(image.size)
                if side > self.max_texture_side:
                    scale = self.max_texture_side / side
                    size = tuple(max(1, round(n * scale)) for n in image.size)
                    image_ = image.convert("RGBA").resize(size, Image.Resampling.BOX)
                else:
                    image_ = image.convert("RGBA")
                self._textures[id(image)] = np.asarray(image_, dtype=np.uint8)
            except IMAGE_ERRORS as error:
                self.warnings.append(
                    f"texture unreadable: {type(error).__name__} {str(error)[:100]}"
                )
                self._textures[id(image)] = None
        return self._textures[id(image)]
