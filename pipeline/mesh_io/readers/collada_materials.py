"""Read the materials, effects and images of COLLADA documents.

Colours of effects are read as sRGB, as most programs write what their users see.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.core.color import srgb_to_linear
from pipeline.mesh_io.images import IMAGE_ERRORS, decode_image
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.collada_schema import PARAMETER_VALUES, SHADERS
from pipeline.mesh_io.readers.collada_values import Document
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot, Wrap
from pipeline.mesh_io.xml_tree import Element

WRAPS: dict[str, Wrap] = {
    "WRAP": "repeat",
    "MIRROR": "mirror",
    "CLAMP": "clamp",
    "BORDER": "clamp",
    "NONE": "clamp",
}
OPAQUE_MODES = ("A_ONE", "RGB_ZERO", "A_ZERO", "RGB_ONE")
LUMINANCE = np.array([0.212671, 0.715160, 0.072169])  # the weights of the specification
WHITE = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class _Value:
    """A colour or a texture of an effect."""

    color: tuple[float, ...] | None = None  # RGBA as the file states it
    texture: Element | None = None


class MaterialReader:
    """Reads each material when it is needed.

    Args:
        document: The document.
        read_file: Returns the content of an image file, or None after a warning.
        max_texture_side: Largest side of the textures that the reader itself decodes.
        warnings: Receives what cannot be used.
    """

    def __init__(
        self,
        document: Document,
        read_file: Callable[[str], bytes | None],
        max_texture_side: int,
        warnings: WarningLog,
    ):
        self.materials: list[SceneMaterial] = []
        self.images: list[SceneImage] = []
        self._document = document
        self._read_file = read_file
        self._max_texture_side = max_texture_side
        self._warnings = warnings
        self._known: dict[object, int] = {}
        self._image_indices: dict[object, int | None] = {}

    def material(self, target: str, uv_set_of: Callable[[str], int], key: object) -> int:
        """Return the index of a material in `materials`, or -1 with a warning.

        Args:
            target: URL or id of a <material>.
            uv_set_of: Returns the set of texture coordinates for a texture's `texcoord`.
            key: Equal for equal `uv_set_of`.
        """
        if (target, key) not in self._known:
            element = self._document.find(target, "material")
            if element is None:
                self._warnings.add("material_missing", target[:80])
                index = -1
            else:
                self.materials.append(self._read(element, uv_set_of))
                index = len(self.materials) - 1
            self._known[target, key] = index
        return self._known[target, key]

    def has_material(self, identifier: str) -> bool:
        """Return whether there is a <material> with this id."""
        return self._document.find(identifier, "material") is not None

    def _read(self, material: Element, uv_set_of: Callable[[str], int]) -> SceneMaterial:
        name = material.get("name") or material.get("id")
        instance = material.first("instance_effect")
        effect = None if instance is None else self._document.find(instance.get("url"), "effect")
        profile = None if effect is None else effect.first("profile_COMMON")
        technique = None if profile is None else profile.first("technique")
        shader = None if technique is None else technique.first(*SHADERS)
        if (
            instance is None
            or effect is None
            or profile is None
            or technique is None
            or shader is None
        ):
            self._warnings.add("material_unreadable", f"{name}: no common profile")
            return SceneMaterial(name=name)
        parameters = {
            parameter.get("sid"): value
            for scope in (effect, profile)
            for parameter in scope.all("newparam")
            for value in parameter.all(*PARAMETER_VALUES)
        }
        for parameter in instance.all("setparam"):
            for value in parameter.all(*PARAMETER_VALUES):
                parameters[parameter.get("ref")] = value
        effect_reader = _EffectReader(self, parameters, uv_set_of, name)
        result = effect_reader.read(shader)
        if any(
            value.text.strip().lower() in ("0", "false")
            for scope in (effect, profile, technique)
            for extra in scope.all("extra")
            for part in extra.all("technique")
            for value in part.all("double_sided")
        ):
            result = replace(result, double_sided=False)
        return result

    def image(self, reference: str) -> int | None:
        """Return the index of an <image>, or None with a warning if it has no content."""
        element = self._document.find(reference, "image")
        key = reference if element is None else id(element)
        if key not in self._image_indices:
            self._image_indices[key] = None
            content, name = None, reference
            if element is None:
                self._warnings.add("image_unreadable", f"there is no image {reference[:80]}")
            else:
                content, name = self._content(element)
            if content is not None:
                self.images.append(SceneImage(name=name, content=content))
                self._image_indices[key] = len(self.images) - 1
        return self._image_indices[key]

    def _content(self, image: Element) -> tuple[bytes | None, str]:
        """Return the bytes of an <image>, or None with a warning, and its name."""
        name = image.get("name") or image.get("id")
        source = image.first("init_from")
        embedded = image.first("data")
        if source is not None:
            embedded = source.first("hex") or embedded
            reference = source.first("ref") or source
            path = reference.text.strip()
            if path:
                return self._read_file(path), path
        if embedded is None or not embedded.text.strip():
            self._warnings.add("image_unreadable", f"{name}: no file")
            return None, name
        try:
            return binascii.unhexlify("".join(embedded.text.split())), name
        except ValueError:
            self._warnings.add("image_unreadable", f"{name}: the data is not hexadecimal")
            return None, name

    def opacity_image(self, index: int, mode: str) -> int | None:
        """Return the index of an image whose red channel is the opacity by colour.

        Args:
            index: The image whose colours state transparency ("RGB_ZERO") or opacity ("RGB_ONE"),
                or whose alpha states transparency ("A_ZERO").
            mode: One of the three.
        """
        key = (index, mode)
        if key not in self._image_indices:
            self._image_indices[key] = None
            source = self.images[index]
            assert isinstance(source.content, bytes)
            try:
                pixels = decode_image(source.content, self._max_texture_side)
            except IMAGE_ERRORS as error:
                detail = f"{source.name}: {type(error).__name__} {str(error)[:60]}"
                self._warnings.add("image_unreadable", detail)
                return None
            if mode == "A_ZERO":
                opacity = 255 - pixels[..., 3]
            else:
                luminance = np.rint(pixels[..., :3] @ LUMINANCE).clip(0, 255).astype(np.uint8)
                opacity = 255 - luminance if mode == "RGB_ZERO" else luminance
            content: NDArray[np.uint8] = np.repeat(opacity[..., None], 4, axis=2)
            content[..., 3] = 255
            self.images.append(SceneImage(name=f"{source.name} opacity", content=content))
            self._image_indices[key] = len(self.images) - 1
        return self._image_indices[key]

    def warn(self, code: str, detail: str) -> None:
        """Record a warning."""
        self._warnings.add(code, detail)

    def numbers(self, element: Element, count: int) -> NDArray[np.float64]:
        """Return the numbers in the text of an element, of which `count` are expected."""
        return self._document.numbers(element, count)


class _EffectReader:
    """Reads one effect in the common profile."""

    def __init__(
        self,
        materials: MaterialReader,
        parameters: dict[str, Element],
        uv_set_of: Callable[[str], int],
        name: str,
    ):
        self._materials = materials
        self._parameters = parameters
        self._uv_set_of = uv_set_of
        self._name = name

    def read(self, shader: Element) -> SceneMaterial:
        """Return the material of a shader element."""
        diffuse = self._value(shader.first("diffuse"))
        emission = self._value(shader.first("emission"))
        base_color, base_slot = WHITE, None
        if diffuse.texture is not None:
            base_slot = self._slot(diffuse.texture)
            if base_slot is None:
                base_color = SceneMaterial().base_color
        elif diffuse.color is not None:
            base_color = (*_linear(diffuse.color), 1.0)
        elif shader.name == "constant" and (emission.color or emission.texture) is not None:
            base_color = (0.0, 0.0, 0.0, 1.0)  # such a surface emits its colour
        else:
            base_color = SceneMaterial().base_color
        emissive, emissive_slot = (0.0, 0.0, 0.0), None
        if emission.texture is not None:
            emissive_slot = self._slot(emission.texture)
            emissive = (0.0, 0.0, 0.0) if emissive_slot is None else (1.0, 1.0, 1.0)
        elif emission.color is not None:
            emissive = _linear(emission.color)
        opacity, opacity_slot = self._opacity(shader)
        return SceneMaterial(
            name=self._name,
            base_color=(base_color[0], base_color[1], base_color[2], opacity),
            base_color_texture=base_slot,
            opacity_texture=opacity_slot,
            emissive=emissive,
            emissive_texture=emissive_slot,
            alpha_mode="OPAQUE" if opacity == 1 and opacity_slot is None else "BLEND",
        )

    def _opacity(self, shader: Element) -> tuple[float, TextureSlot | None]:
        """Return the opacity of a shader: a number, and the slot of a texture that multiplies it.

        A_ONE: alpha times the transparency. RGB_ZERO: 1 - luminance times the transparency. A_ZERO
        and RGB_ONE of version 1.5 are the other two combinations.
        """
        element = shader.first("transparent")
        mode = "A_ONE" if element is None else element.get("opaque", "A_ONE").upper()
        if mode not in OPAQUE_MODES:
            self._materials.warn("invalid_value", f"opaque {mode[:50]}")
            mode = "A_ONE"
        transparent = self._value(element)
        factor = self._factor(shader.first("transparency"))
        if transparent.texture is not None:
            return self._textured_opacity(transparent.texture, mode, factor)
        color = np.array(transparent.color or WHITE)
        if transparent.color is None and mode in ("RGB_ZERO", "A_ZERO"):
            return 1.0, None
        amount = float(color[3] if mode.startswith("A") else color[:3] @ LUMINANCE) * factor
        opacity = 1 - amount if mode.endswith("ZERO") else amount
        if opacity <= 0 and mode == "A_ONE" and (element is None or not element.get("opaque")):
            # Writers of the time before the attribute stated how transparent a surface is.
            self._materials.warn("invalid_value", f"{self._name}: transparency 0 read as opaque")
            return 1.0, None
        # Rounded numbers such as 0.9999 mean an opaque surface.
        return (1.0 if 0.999 < opacity < 1.001 else opacity), None

    def _textured_opacity(
        self, texture: Element, mode: str, factor: float
    ) -> tuple[float, TextureSlot | None]:
        slot = self._slot(texture)
        if slot is None:
            return 1.0, None
        if mode == "A_ONE":
            return factor or 1.0, replace(slot, channel="a")
        if mode.endswith("ZERO") and factor != 1:
            self._materials.warn("appearance_ignored", f"{self._name}: transparency {factor:g}")
        image = self._materials.opacity_image(slot.image, mode)
        if image is None:
            return 1.0, None
        opacity = factor if mode == "RGB_ONE" else 1.0
        return opacity, replace(slot, image=image, channel="r")

    def _factor(self, element: Element | None) -> float:
        """Return the number of <transparency>, by default 1."""
        value = None
        if element is not None:
            value = element.first("float") or self._parameter(element.first("param"))
        numbers = np.empty(0) if value is None else self._materials.numbers(value, 1)
        if len(numbers) != 1 or not np.isfinite(numbers[0]):
            if element is not None:
                self._materials.warn("invalid_value", f"{self._name}: transparency")
            return 1.0
        return float(numbers[0])

    def _value(self, element: Element | None) -> _Value:
        """Return the colour or texture of <diffuse>, <emission> or <transparent>."""
        if element is None:
            return _Value()
        texture = element.first("texture")
        if texture is not None:
            return _Value(texture=texture)
        source = element.first("color") or self._parameter(element.first("param"))
        if source is None:
            self._materials.warn("invalid_value", f"{self._name}: {element.name}")
            return _Value()
        numbers = self._materials.numbers(source, 4)
        if len(numbers) not in (3, 4) or not np.isfinite(numbers).all():
            self._materials.warn("invalid_value", f"{self._name}: {element.name}")
            return _Value()
        return _Value(color=(*numbers.tolist(), 1.0)[:4])

    def _parameter(self, element: Element | None) -> Element | None:
        """Return the value that <param ref="..."> refers to."""
        return None if element is None else self._parameters.get(element.get("ref"))

    def _slot(self, texture: Element) -> TextureSlot | None:
        """Return how a <texture> reads its image, or None with a warning."""
        reference = texture.get("texture")
        sampler = self._parameters.get(reference)
        wraps: dict[str, Wrap] = {}
        nearest = False
        image = reference
        if sampler is not None and sampler.name == "sampler2D":
            image = self._image_of(sampler, reference)
            for name in ("wrap_s", "wrap_t"):
                element = sampler.first(name)
                text = "WRAP" if element is None else element.text.strip().upper()
                if text not in WRAPS:
                    self._materials.warn("invalid_value", f"{name} {text[:50]}")
                wraps[name] = WRAPS.get(text, "repeat")
            magnification = sampler.first("magfilter")
            nearest = magnification is not None and magnification.text.strip().upper() == "NEAREST"
        elif sampler is not None and sampler.name == "surface":
            image = self._init_from(sampler)
        index = self._materials.image(image)
        if index is None:
            return None
        return TextureSlot(
            image=index,
            uv_set=self._uv_set_of(texture.get("texcoord")),
            wrap_u=wraps.get("wrap_s", "repeat"),
            wrap_v=wraps.get("wrap_t", "repeat"),
            nearest=nearest,
        )

    def _image_of(self, sampler: Element, reference: str) -> str:
        """Return the id of the image that a sampler reads."""
        instance = sampler.first("instance_image")
        if instance is not None:
            return instance.get("url")
        source = sampler.first("source")
        name = "" if source is None else source.text.strip()
        surface = self._parameters.get(name)
        if surface is not None and surface.name == "surface":
            return self._init_from(surface)
        return name or reference

    def _init_from(self, surface: Element) -> str:
        source = surface.first("init_from")
        if source is None:
            return ""
        return (source.first("ref") or source).text.strip()


def _linear(color: tuple[float, ...]) -> tuple[float, float, float]:
    """Return the linear light of an sRGB colour."""
    red, green, blue = srgb_to_linear(np.array(color[:3])).tolist()
    return red, green, blue
