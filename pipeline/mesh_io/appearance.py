"""Convert the materials of a scene to those that the renderer draws."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.schema import Material, Sampler, SurfaceMap
from pipeline.mesh_io.images import IMAGE_ERRORS, decode_image, fit_image
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Scene, SceneMaterial, TextureSlot

# Field of a material -> smallest and largest value. A lamp may emit more light than 1.
FACTOR_LIMITS = {
    "base_color": (0.0, 1.0),
    "metallic": (0.0, 1.0),
    "roughness": (0.0, 1.0),
    "occlusion_strength": (0.0, 1.0),
    "emissive": (0.0, np.inf),
    "alpha_cutoff": (0.0, np.inf),
    "normal_scale": (-np.inf, np.inf),
}
FACTOR_TOLERANCE = 1e-3  # by which rounding may take a factor out of its range


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """A drawable material and the slots that give its texture coordinates."""

    material: Material
    base_slot: TextureSlot | None = None
    emissive_slot: TextureSlot | None = None
    map_slots: Mapping[str, TextureSlot] = field(default_factory=dict)  # by names of MAP_NAMES


class AppearanceConverter:
    """Converts the materials of one scene, each at most once.

    Args:
        scene: The materials and images.
        max_texture_side: Largest side of a texture in pixels. Larger ones are scaled down.
        warnings: Receives "image_unreadable", "invalid_value", "material_missing" and
            "texture_without_uv".
    """

    def __init__(self, scene: Scene, max_texture_side: int, warnings: WarningLog):
        self.scene = scene
        self.max_texture_side = max_texture_side
        self.warnings = warnings
        self._images: dict[int, NDArray[np.uint8] | None] = {}
        self._allowed: dict[int, SceneMaterial] = {}
        self._converted: dict[tuple[int, bool, frozenset[int]], Appearance] = {}

    def convert(self, index: int, *, is_colored: bool, uv_sets: Collection[int]) -> Appearance:
        """Return the appearance of a material.

        Args:
            index: Index in `Scene.materials`; -1 is no material.
            is_colored: Whether the geometry has colours of its own. Without a material they are
                drawn as they are, not multiplied by the grey of the default material.
            uv_sets: The sets of texture coordinates of the geometry. A texture that reads another
                set is not drawn, and the material has its colour without the texture.
        """
        is_known = 0 <= index < len(self.scene.materials)
        key = (index, is_colored and not is_known, frozenset(uv_sets))
        if key not in self._converted:
            if is_known:
                if index not in self._allowed:
                    self._allowed[index] = _with_allowed_factors(
                        self.scene.materials[index], self.warnings
                    )
                self._converted[key] = self._convert(self._allowed[index], uv_sets)
            else:
                if index != -1:
                    self.warnings.add("material_missing", f"number {index}")
                color = (1.0, 1.0, 1.0, 1.0) if is_colored else Material().base_color
                self._converted[key] = Appearance(material=Material(base_color=color))
        return self._converted[key]

    def _convert(self, source: SceneMaterial, uv_sets: Collection[int]) -> Appearance:
        base_slot, texture = self._drawn_texture(source.base_color_texture, uv_sets)
        opacity_slot, opacity = self._drawn_texture(source.opacity_texture, uv_sets)
        if opacity is not None and opacity_slot is not None:
            values = _channel(opacity, opacity_slot)
            # The alpha of an image that gives both colour and opacity counts once.
            if texture is None or texture is not opacity or (values != texture[..., 3]).any():
                texture = _with_opacity(texture, values)
            base_slot = base_slot or opacity_slot
        emissive_slot, emissive = self._drawn_texture(source.emissive_texture, uv_sets)
        roughness = source.roughness * self._mean(source.roughness_texture)
        if source.glossiness_texture is not None:
            roughness = 1 - (1 - roughness) * self._mean(source.glossiness_texture)
        map_slots, maps = self._maps(source, uv_sets)
        color = source.base_color
        if source.texture_replaces_color and source.base_color_texture is not None:
            color = color if base_slot is None else (1.0, 1.0, 1.0, color[3])
        material = Material(
            base_color=color,
            texture=texture,
            sampler=_sampler(base_slot),
            # The lamps use one value per material: the mean of the texture.
            metallic=source.metallic * self._mean(source.metallic_texture),
            roughness=roughness,
            maps=maps,
            normal_scale=source.normal_scale,
            alpha_mode=source.alpha_mode,
            alpha_cutoff=source.alpha_cutoff,
            double_sided=source.double_sided,
            # A texture that is not drawn emits nothing, not the white of its factor.
            emissive=(0.0, 0.0, 0.0)
            if source.emissive_texture is not None and emissive is None
            else source.emissive,
            emissive_texture=emissive,
            emissive_sampler=_sampler(emissive_slot),
            unlit=source.unlit,
        )
        return Appearance(
            material=material,
            base_slot=base_slot,
            emissive_slot=emissive_slot,
            map_slots=map_slots,
        )

    def _maps(
        self, source: SceneMaterial, uv_sets: Collection[int]
    ) -> tuple[dict[str, TextureSlot], dict[str, SurfaceMap]]:
        """Return the maps of a material and the slots that give their texture coordinates.

        The values of a map contain the factors of the material.
        """
        slots: dict[str, TextureSlot] = {}
        maps: dict[str, SurfaceMap] = {}

        def add(
            name: str, wanted: TextureSlot | None, of_image: Callable[..., NDArray[np.floating]]
        ) -> None:
            slot, image = self._drawn_texture(wanted, uv_sets)
            if slot is not None and image is not None:
                values = np.clip(of_image(_channel(image, slot) / 255), 0, 1)
                values = np.rint(255 * values).astype(np.uint8)
                slots[name], maps[name] = slot, SurfaceMap(values=values, sampler=_sampler(slot))

        strength = source.occlusion_strength
        add("metallic", source.metallic_texture, lambda m: source.metallic * m)
        add("roughness", source.roughness_texture, lambda r: source.roughness * r)
        add("roughness", source.glossiness_texture, lambda g: 1 - (1 - source.roughness) * g)
        add("occlusion", source.occlusion_texture, lambda o: 1 + strength * (o - 1))
        slot, image = self._drawn_texture(source.normal_texture, uv_sets)
        if slot is not None and image is not None:
            slots["normal"] = slot
            maps["normal"] = SurfaceMap(values=image[..., :3], sampler=_sampler(slot))
        return slots, maps

    def _texture(
        self, slot: TextureSlot | None
    ) -> tuple[TextureSlot, NDArray[np.uint8]] | tuple[None, None]:
        """Return a slot and its image, or (None, None) if the image cannot be drawn."""
        image = None if slot is None else self._image(slot.image)
        return (None, None) if slot is None or image is None else (slot, image)

    def _drawn_texture(
        self, slot: TextureSlot | None, uv_sets: Collection[int]
    ) -> tuple[TextureSlot, NDArray[np.uint8]] | tuple[None, None]:
        """Return a slot and its image, or (None, None) if it has no texture coordinates either."""
        slot, image = self._texture(slot)
        if slot is None or image is None:
            return None, None
        if slot.uv_set not in uv_sets:
            self.warnings.add("texture_without_uv", f"set {slot.uv_set}")
            return None, None
        return slot, image

    def _mean(self, slot: TextureSlot | None) -> float:
        slot, image = self._texture(slot)
        if slot is None or image is None:
            return 1.0
        return float(_channel(image, slot).mean()) / 255

    def _image(self, index: int) -> NDArray[np.uint8] | None:
        """Return an image as uint8 [h, w, 4], or None with a warning."""
        if index not in self._images:
            self._images[index] = None
            if not 0 <= index < len(self.scene.images):
                self.warnings.add("image_unreadable", f"there is no image {index}")
            elif self.scene.images[index].content is not None:
                self._images[index] = self._decode(index)
        return self._images[index]

    def _decode(self, index: int) -> NDArray[np.uint8] | None:
        image = self.scene.images[index]
        assert image.content is not None
        if isinstance(image.content, np.ndarray):
            return fit_image(image.content, self.max_texture_side)
        try:
            return decode_image(image.content, self.max_texture_side)
        except IMAGE_ERRORS as error:
            reason = f"{type(error).__name__} {str(error)[:60]}"
            self.warnings.add("image_unreadable", f"{image.name}: {reason}")
            return None


def _with_allowed_factors(material: SceneMaterial, warnings: WarningLog) -> SceneMaterial:
    """Return a material whose factors are within their limits, with a warning if one was not."""
    allowed: dict[str, Any] = {}
    for name, (low, high) in FACTOR_LIMITS.items():
        stated = np.array(getattr(material, name), dtype=np.float64)
        is_valid = np.isfinite(stated) & (stated >= low) & (stated <= high)
        if is_valid.all():
            continue
        with np.errstate(invalid="ignore"):
            is_near = (stated >= low - FACTOR_TOLERANCE) & (stated <= high + FACTOR_TOLERANCE)
        if not (is_near & np.isfinite(stated)).all():
            value = ", ".join(f"{number:g}" for number in np.atleast_1d(stated).tolist())
            detail = f"{material.name}: {name.replace('_', ' ')} {value}"
            warnings.add("invalid_value", detail)
        default = np.array(getattr(SceneMaterial(), name))
        result = np.clip(np.where(np.isfinite(stated), stated, default), low, high)
        allowed[name] = tuple(result.tolist()) if result.ndim else float(result)
    return replace(material, **allowed) if allowed else material


def _channel(image: NDArray[np.uint8], slot: TextureSlot) -> NDArray[np.uint8]:
    """Return the values [h, w] of a slot that reads one value a texel."""
    if slot.channel != "auto":
        return image[..., "rgba".index(slot.channel)]
    if (image[..., 3] != 255).any():
        return image[..., 3]
    return np.rint(image[..., :3].mean(axis=2)).astype(np.uint8)


def _with_opacity(
    texture: NDArray[np.uint8] | None, opacity: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Multiply the alpha of a texture [h, w, 4] by opacities [h', w'].

    The result has the size of the larger image. Without a texture it is white.
    """
    if texture is None:
        texture = np.full((*opacity.shape, 4), 255, dtype=np.uint8)
    height, width = (max(a, b) for a, b in zip(texture.shape[:2], opacity.shape, strict=True))

    def resized(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows = np.arange(height) * image.shape[0] // height
        columns = np.arange(width) * image.shape[1] // width
        return image[rows[:, None], columns]

    texture = resized(texture).copy()
    alpha = texture[..., 3].astype(np.uint16) * resized(opacity)
    texture[..., 3] = np.rint(alpha / 255).astype(np.uint8)
    return texture


def _sampler(slot: TextureSlot | None) -> Sampler:
    if slot is None:
        return Sampler()
    return Sampler(wrap_u=slot.wrap_u, wrap_v=slot.wrap_v, nearest=slot.nearest)
