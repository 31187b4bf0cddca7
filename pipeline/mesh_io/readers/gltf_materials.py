"""Materials, textures and images of glTF files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.gltf_accessors import Accessors
from pipeline.mesh_io.readers.gltf_document import (
    Document,
    Element,
    GltfError,
    MissingFileError,
)
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot, Wrap

WRAPS: dict[int, Wrap] = {10497: "repeat", 33648: "mirror", 33071: "clamp"}
NEAREST, LINEAR = 9728, 9729
# Where a texture states its image, the first that exists is taken. Formats that every viewer reads
# come before those that need more: the plain image is the fallback of the extensions that follow.
IMAGE_SOURCES = (
    "EXT_texture_webp",
    "",
    "KHR_texture_basisu",
    "EXT_texture_avif",
    "MSFT_texture_dds",
)

# Extension of a material that is not drawn -> whether its values have an effect at all.
UNDRAWN_MATERIALS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "KHR_materials_anisotropy": lambda data: data.get("anisotropyStrength", 0) != 0,
    "KHR_materials_clearcoat": lambda data: data.get("clearcoatFactor", 0) != 0,
    "KHR_materials_diffuse_transmission": lambda data: (
        data.get("diffuseTransmissionFactor", 0) != 0
    ),
    "KHR_materials_dispersion": lambda data: data.get("dispersion", 0) != 0,
    "KHR_materials_ior": lambda data: data.get("ior", 1.5) != 1.5,
    "KHR_materials_iridescence": lambda data: data.get("iridescenceFactor", 0) != 0,
    "KHR_materials_sheen": lambda data: data.get("sheenColorFactor", [0, 0, 0]) != [0, 0, 0],
    "KHR_materials_specular": lambda data: (
        data.get("specularFactor", 1) != 1
        or data.get("specularColorFactor", [1, 1, 1]) != [1, 1, 1]
        or bool({"specularTexture", "specularColorTexture"} & data.keys())
    ),
    "KHR_materials_transmission": lambda data: data.get("transmissionFactor", 0) != 0,
    "KHR_materials_volume": lambda data: data.get("thicknessFactor", 0) != 0,
    "KHR_materials_volume_scatter": lambda data: True,
    "KHR_materials_subsurface": lambda data: True,
    "KHR_materials_common": lambda data: True,
    "KHR_techniques_webgl": lambda data: True,
    "ADOBE_materials_clearcoat_specular": lambda data: True,
    "ADOBE_materials_clearcoat_tint": lambda data: True,
    "ADOBE_materials_thin_transparency": lambda data: True,
    "NV_materials_mdl": lambda data: True,
    "VRMC_materials_mtoon": lambda data: True,
    "VRMC_materials_hdr_emissiveMultiplier": lambda data: True,
    "MSFT_materials_clearcoat": lambda data: True,
}
SPECULAR_GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
# Extensions that are read here, by the place at which they stand.
READ_MATERIALS = ("KHR_materials_emissive_strength", "KHR_materials_unlit", SPECULAR_GLOSSINESS)

DIELECTRIC_SPECULAR = 0.04  # reflectance of common materials that are no metals


class Materials:
    """Converts the materials of one document that geometry uses.

    Args:
        document: The document.
        accessors: Reads the images.
    """

    def __init__(self, document: Document, accessors: Accessors):
        self.document = document
        self.accessors = accessors
        self.warnings = document.warnings
        self.materials: list[SceneMaterial] = []
        self.images = [
            SceneImage(name=f"images[{index}]", content=None)
            for index in range(document.count("images"))
        ]
        self._converted: dict[int, int] = {}

    def number(self, index: int | None) -> int:
        """Return the number in `materials` of a material of the document, -1 if there is none."""
        if index is None:
            return -1
        if index not in self._converted:
            try:
                material = self._convert(self.document.element("materials", index))
            except GltfError as error:
                self.warnings.add("material_missing", str(error))
                self._converted[index] = -1
            else:
                self._converted[index] = len(self.materials)
                self.materials.append(material)
        return self._converted[index]

    def _convert(self, element: Element) -> SceneMaterial:
        for name, has_effect in UNDRAWN_MATERIALS.items():
            extension = element.extension(name)
            if extension is not None and has_effect(extension.data):
                self.warnings.add("appearance_ignored", f"{element.name}: {name}")
        specular_glossiness = element.extension(SPECULAR_GLOSSINESS)
        if specular_glossiness is None:
            material = self._metallic_roughness(element.child("pbrMetallicRoughness"))
        else:
            material = self._specular_glossiness(specular_glossiness)
        emissive = np.array(element.numbers("emissiveFactor", (0.0, 0.0, 0.0)))
        strength = element.extension("KHR_materials_emissive_strength")
        if strength is not None:
            emissive *= strength.number("emissiveStrength", 1.0)
        emissive_texture = None
        if emissive.any():  # otherwise the texture has no effect
            emissive_texture = self._slot(element, "emissiveTexture")
            if emissive_texture is None and "emissiveTexture" in element.data:
                emissive *= 0  # an unreadable texture emits nothing, not the white of its factor
        red, green, blue = emissive.tolist()
        return replace(
            material,
            name=element.name,
            emissive=(red, green, blue),
            emissive_texture=emissive_texture,
            normal_texture=self._slot(element, "normalTexture"),
            normal_scale=element.child("normalTexture").number("scale", 1.0),
            occlusion_texture=self._slot(element, "occlusionTexture", "r"),
            occlusion_strength=element.child("occlusionTexture").number("strength", 1.0),
            alpha_mode=element.word("alphaMode", ("OPAQUE", "MASK", "BLEND")),
            alpha_cutoff=element.number("alphaCutoff", 0.5),
            double_sided=element.flag("doubleSided", False),
            unlit=element.extension("KHR_materials_unlit") is not None,
        )

    def _metallic_roughness(self, element: Element) -> SceneMaterial:
        red, green, blue, alpha = element.numbers("baseColorFactor", (1.0, 1.0, 1.0, 1.0))
        return SceneMaterial(
            base_color=(red, green, blue, alpha),
            base_color_texture=self._slot(element, "baseColorTexture"),
            metallic=element.number("metallicFactor", 1.0),
            roughness=element.number("roughnessFactor", 1.0),
            metallic_texture=self._slot(element, "metallicRoughnessTexture", "b"),
            roughness_texture=self._slot(element, "metallicRoughnessTexture", "g"),
        )

    def _specular_glossiness(self, element: Element) -> SceneMaterial:
        """Convert a material of specular colour and glossiness.

        The diffuse colour becomes the base colour of a dielectric. A material without diffuse
        colour is a metal, whose base colour is the specular one.
        """
        red, green, blue, alpha = element.numbers("diffuseFactor", (1.0, 1.0, 1.0, 1.0))
        specular = element.numbers("specularFactor", (1.0, 1.0, 1.0))
        texture = self._slot(element, "specularGlossinessTexture")
        material = SceneMaterial(
            base_color=(red, green, blue, alpha),
            base_color_texture=self._slot(element, "diffuseTexture"),
            metallic=0.0,
            roughness=1.0 - element.number("glossinessFactor", 1.0),
            glossiness_texture=None if texture is None else replace(texture, channel="a"),
        )
        has_specular = max(specular) > DIELECTRIC_SPECULAR
        if max(red, green, blue) <= 0 and has_specular:
            return replace(
                material,
                base_color=(*specular, alpha),
                base_color_texture=texture,
                metallic=1.0,
            )
        is_stated = bool({"specularFactor", "specularGlossinessTexture"} & element.data.keys())
        if has_specular and is_stated:
            self.warnings.add("appearance_ignored", f"{element.path}: specular colour")
        return material

    def _slot(
        self,
        parent: Element,
        key: str,
        channel: Literal["auto", "r", "g", "b", "a"] = "auto",
    ) -> TextureSlot | None:
        """Return the texture slot at `key`, or None if there is none or it has no image."""
        if key not in parent.data:
            return None
        info = parent.child(key)
        index = info.index("index")
        try:
            if index is None:
                raise GltfError(f"{info.path} names no texture")
            texture = self.document.element("textures", index)
            image = self._image_of(texture)
        except MissingFileError:
            return None
        except GltfError as error:
            self.warnings.add("image_unreadable", str(error))
            return None
        slot = TextureSlot(image=image, uv_set=info.index("texCoord") or 0, channel=channel)
        sampler = texture.index("sampler")
        if sampler is not None:
            slot = self._sampled(slot, sampler)
        transform = info.extension("KHR_texture_transform")
        if transform is not None:
            uv_set = transform.index("texCoord")
            slot = replace(
                slot,
                transform=texture_transform(transform),
                uv_set=slot.uv_set if uv_set is None else uv_set,
            )
        return slot

    def _sampled(self, slot: TextureSlot, index: int) -> TextureSlot:
        """Apply a sampler to a slot."""
        try:
            sampler = self.document.element("samplers", index)
        except GltfError as error:
            self.warnings.add("invalid_value", str(error))
            return slot
        wraps = []
        for key in ("wrapS", "wrapT"):
            number = sampler.index(key)
            if number is not None and number not in WRAPS:
                sampler.invalid(key, f"one of {sorted(WRAPS)}")
            wraps.append(WRAPS.get(10497 if number is None else number, "repeat"))
        magnification = sampler.index("magFilter")
        if magnification not in (None, NEAREST, LINEAR):
            sampler.invalid("magFilter", f"{NEAREST} or {LINEAR}")
        return replace(slot, wrap_u=wraps[0], wrap_v=wraps[1], nearest=magnification == NEAREST)

    def _image_of(self, texture: Element) -> int:
        """Return the image of a texture.

        Raises:
            GltfError: If it has none that can be read.
        """
        error = GltfError(f"{texture.path} has no image")
        for name in IMAGE_SOURCES:
            holder = texture.extension(name) if name else texture
            index = None if holder is None else holder.index("source")
            if index is None:
                continue
            try:
                self._read_image(index)
            except GltfError as problem:
                error = problem
            else:
                return index
        raise error

    def _read_image(self, index: int) -> None:
        """Put the content of an image into `images`.

        Raises:
            GltfError: If there is no content.
        """
        content = self.accessors.cached(("image", index), lambda: self._image_content(index))
        name = self.document.element("images", index).name
        self.images[index] = SceneImage(name=name, content=content)

    def _image_content(self, index: int) -> bytes:
        element = self.document.element("images", index)
        view, uri = element.index("bufferView"), element.data.get("uri")
        if view is not None:
            return bytes(self.accessors.view(view))
        if not isinstance(uri, str):
            raise GltfError(f"{element.path} has no content")
        return self.accessors.resource(uri)


def texture_transform(element: Element) -> NDArray[np.float64]:
    """Return the matrix [2, 3] of KHR_texture_transform for coordinates with v = 0 at the bottom.

    The extension states it for v = 0 at the top, as offset * rotation * scale.
    """
    offset = np.array(element.numbers("offset", (0.0, 0.0)))
    angle = element.number("rotation", 0.0)
    cosine, sine = np.cos(angle), np.sin(angle)
    linear = np.array([[cosine, sine], [-sine, cosine]]) * element.numbers("scale", (1.0, 1.0))
    flip = np.diag([1.0, -1.0])
    top = np.array([0.0, 1.0])
    return np.column_stack([flip @ linear @ flip, flip @ (linear @ top + offset) + top])
