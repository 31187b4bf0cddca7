"""Property groups of a 3MF model part: base materials, colours, textures and their mixtures.

Colours are sRGB. Interpolation between corners is in sRGB and mixing is in linear light, as the
materials extension says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.color import linear_to_srgb, srgb_to_linear
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot, Wrap
from pipeline.mesh_io.xml_tree import Element
from pipeline.mesh_io.zip_package import MEMBER_ERRORS, ZipPackage

GROUP_NAMES = (
    "basematerials",
    "m:colorgroup",
    "m:texture2dgroup",
    "m:compositematerials",
    "m:multiproperties",
)
# Groups of display properties of which only the look on a screen is described.
UNUSED_DISPLAY_PROPERTIES = (
    "m:pbspeculardisplayproperties",
    "m:pbspeculartexturedisplayproperties",
    "m:pbmetallictexturedisplayproperties",
    "m:translucentdisplayproperties",
)
COLOR = re.compile(r"#([0-9A-Fa-f]{6})([0-9A-Fa-f]{2})?$")
# "none" leaves the surface beyond the image without a texture; its last texels come closest.
WRAPS: dict[str, Wrap] = {"wrap": "repeat", "mirror": "mirror", "clamp": "clamp", "none": "clamp"}
WHITE = (255, 255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class PropertyGroup:
    """A property group with N properties.

    Attributes:
        materials: int64 [N], index in `Appearances.materials` of each property.
        colors: uint8 [N, 4], sRGB with alpha; they multiply the material. None is white.
        uv: float32 [N, 2], or None if there is no texture.
    """

    materials: NDArray[np.int64]
    colors: NDArray[np.uint8] | None = None
    uv: NDArray[np.float32] | None = None


@dataclass(kw_only=True)
class Appearances:
    """The materials and images of a file, which all its parts share.

    Attributes:
        materials: The materials.
        images: The images.
    """

    materials: list[SceneMaterial] = field(default_factory=list)
    images: list[SceneImage] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)

    def add(self, material: SceneMaterial, key: object) -> int:
        """Return the index of a material; the same one for equal keys."""
        if key not in self._known:
            self._known[key] = len(self.materials)
            self.materials.append(material)
        return self._known[key]

    def default(self) -> int:
        """Return the index of the material of geometry without properties."""
        return self.add(SceneMaterial(), "default")

    def of_color(self, rgba: tuple[int, ...]) -> int:
        """Return the index of a material with an sRGB colour (0 to 255) and alpha."""
        alpha = rgba[3] / 255
        linear = srgb_to_linear(np.array(rgba[:3]) / 255)
        material = SceneMaterial(
            base_color=(float(linear[0]), float(linear[1]), float(linear[2]), alpha),
            alpha_mode="OPAQUE" if alpha == 1 else "BLEND",
        )
        return self.add(material, ("color", *rgba))

    def tinted(self, material: int, rgba: tuple[int, ...]) -> int:
        """Return the index of a material that is multiplied by an sRGB colour."""
        source = self.materials[material]
        factors = (*srgb_to_linear(np.array(rgba[:3]) / 255).tolist(), rgba[3] / 255)
        red, green, blue, alpha = (a * b for a, b in zip(source.base_color, factors, strict=True))
        tinted = replace(source, base_color=(red, green, blue, alpha))
        return self.add(tinted, ("tinted", material, rgba))


class PropertyGroups:
    """Reads the property groups of one model part when geometry refers to them.

    Args:
        resources: The children of <resources>.
        part: Name of the part.
        package: The package, for textures.
        appearances: Receives the materials and images.
        warnings: Receives what cannot be used.
    """

    def __init__(
        self,
        resources: list[Element],
        part: str,
        package: ZipPackage,
        appearances: Appearances,
        warnings: WarningLog,
    ):
        self._elements: dict[str, Element] = {}
        for element in resources:
            if element.name != "object":
                self._elements.setdefault(element.get("id"), element)
        self._part = part
        self._package = package
        self._appearances = appearances
        self._warnings = warnings
        self._groups: dict[str, PropertyGroup | None] = {}
        self._images: dict[str, int | None] = {}

    def get(self, identifier: str) -> PropertyGroup | None:
        """Return a property group, or None with a warning if it does not exist."""
        if identifier not in self._groups:
            self._groups[identifier] = None  # a group that refers to itself finds nothing
            self._groups[identifier] = self._read(identifier)
        return self._groups[identifier]

    def _read(self, identifier: str) -> PropertyGroup | None:
        element = self._elements.get(identifier)
        if element is None or element.name not in GROUP_NAMES:
            self._warnings.add("material_missing", f"property group {identifier[:50]}")
            return None
        if element.name == "basematerials":
            return self._base_materials(element)
        if element.name == "m:colorgroup":
            return self._with_colors(self._colors(element), element)
        if element.name == "m:texture2dgroup":
            return self._texture_group(element)
        if element.name == "m:compositematerials":
            return self._with_colors(self._composites(element), element)
        return self._multi_properties(element)

    def _base_materials(self, element: Element) -> PropertyGroup:
        display = self._display_properties(element)
        indices = []
        for index, base in enumerate(element.all("base")):
            material = self._appearances.of_color(self._color(base.get("displaycolor")))
            indices.append(self._displayed(material, display, index))
        return PropertyGroup(materials=np.array(indices, dtype=np.int64))

    def _displayed(self, material: int, display: list[Element], index: int) -> int:
        """Return a material with the metallic display properties of a group applied to it."""
        if index >= len(display):
            return material
        metallic = self._number(display[index].get("metallicness", "0"), 0.0)
        roughness = self._number(display[index].get("roughness", "1"), 1.0)
        source = replace(
            self._appearances.materials[material], metallic=metallic, roughness=roughness
        )
        return self._appearances.add(source, ("metallic", material, metallic, roughness))

    def _display_properties(self, element: Element) -> list[Element]:
        """Return the metallic properties that a group refers to, one for each of its properties."""
        identifier = element.get("displaypropertiesid")
        if not identifier:
            return []
        display = self._elements.get(identifier)
        if display is None:
            self._warnings.add("material_missing", f"display properties {identifier[:50]}")
        elif display.name == "m:pbmetallicdisplayproperties":
            return list(display.all("m:pbmetallic"))
        else:
            self._warnings.add("appearance_ignored", display.name)
        return []

    def _with_colors(self, colors: NDArray[np.uint8], element: Element) -> PropertyGroup:
        """Return a group of opaque colours. Alpha counts only within multi-properties."""
        colors = colors.copy()
        colors[:, 3] = 255
        white = self._appearances.of_color(WHITE)
        display = self._display_properties(element)
        materials = [self._displayed(white, display, index) for index in range(len(display))]
        indices = np.full(len(colors), white)
        count = min(len(materials), len(colors))
        indices[:count] = materials[:count]
        return PropertyGroup(materials=indices, colors=colors)

    def _colors(self, element: Element) -> NDArray[np.uint8]:
        values = [self._color(text) for text in element.stream or ()]
        return np.array(values, dtype=np.uint8).reshape(-1, 4)

    def _composites(self, element: Element) -> NDArray[np.uint8]:
        """Return the colours of mixtures of base materials, mixed in linear light."""
        base = self._elements.get(element.get("matid"))
        if base is None or base.name != "basematerials":
            self._warnings.add("material_missing", f"base materials {element.get('matid')[:50]}")
            return np.empty((0, 4), dtype=np.uint8)
        colors = np.array(
            [self._color(item.get("displaycolor")) for item in base.all("base")]
        ).reshape(-1, 4)
        indices = self._integers(element.get("matindices"))
        valid = [index for index in indices if 0 <= index < len(colors)]
        if len(valid) < len(indices):
            self._warnings.add("material_missing", "constituent", len(indices) - len(valid))
        if not valid:
            return np.empty((0, 4), dtype=np.uint8)
        linear = srgb_to_linear(colors[valid, :3] / 255)
        mixed = []
        for text in element.stream or ():
            shares = np.zeros(len(valid))
            values = self._numbers(text)[: len(valid)]
            shares[: len(values)] = np.maximum(values, 0)
            total = shares.sum()
            shares = shares / total if total > 0 else np.full(len(valid), 1 / len(valid))
            mixed.append(shares @ linear)
        return _to_bytes(np.array(mixed).reshape(-1, 3), np.ones(len(mixed)))

    def _texture_group(self, element: Element) -> PropertyGroup:
        uv = np.array(element.stream if element.stream is not None else (), dtype=np.float32)
        uv = uv.reshape(-1, 2)
        display = element.get("displaypropertiesid")
        if display:
            self._warnings.add("appearance_ignored", f"display properties {display[:50]}")
        material = self._texture_material(element.get("texid"))
        return PropertyGroup(materials=np.full(len(uv), material), uv=uv)

    def _texture_material(self, identifier: str) -> int:
        """Return the index of an opaque material with a <texture2d>."""
        texture = self._elements.get(identifier)
        if texture is None or texture.name != "m:texture2d":
            self._warnings.add("material_missing", f"texture {identifier[:50]}")
            return self._appearances.default()
        if identifier not in self._images:
            self._images[identifier] = self._image(texture.get("path"))
        image = self._images[identifier]
        if image is None:
            return self._appearances.default()
        wraps = []
        for name in ("tilestyleu", "tilestylev"):
            style = texture.get(name, "wrap").lower()
            if style not in WRAPS:
                self._warnings.add("invalid_value", f"{name} {style[:50]}")
            if style == "none":
                self._warnings.add("appearance_ignored", f"{name} none")
            wraps.append(WRAPS.get(style, "repeat"))
        if "box" in texture.attributes:
            self._warnings.add("appearance_ignored", "texture2d@box")
        material = SceneMaterial(
            name=texture.get("path"),
            base_color=(1.0, 1.0, 1.0, 1.0),
            base_color_texture=TextureSlot(
                image=image,
                wrap_u=wraps[0],
                wrap_v=wraps[1],
                nearest=texture.get("filter").lower() == "nearest",
            ),
        )
        return self._appearances.add(material, ("texture", self._part, identifier))

    def _image(self, path: str) -> int | None:
        """Read an image of the package and return its index, or None with a warning."""
        name = self._package.find(path, self._part)
        if name is None:
            self._warnings.add("side_file_missing", path)
            return None
        try:
            content = self._package.read(name)
        except MEMBER_ERRORS as error:
            self._warnings.add("image_unreadable", f"{path}: {type(error).__name__}")
            return None
        self._appearances.images.append(SceneImage(name=path, content=content))
        return len(self._appearances.images) - 1

    def _multi_properties(self, element: Element) -> PropertyGroup | None:
        """Reduce layers of properties to one material, one colour and one texture coordinate."""
        identifiers = element.get("pids").split()
        methods = ["mix", *element.get("blendmethods").lower().split()]
        rows = [self._integers(text) for text in element.stream or ()]
        # A property without an index for a layer uses its first one.
        indices = np.zeros((len(rows), len(identifiers)), dtype=np.int64)
        for row, values in enumerate(rows):
            indices[row, : len(values)] = values[: len(identifiers)]
        mixture = _Mixture(len(rows), self._warnings)
        for layer, identifier in enumerate(identifiers):
            source = self._elements.get(identifier)
            if source is not None and source.name == "m:multiproperties":
                self._warnings.add("invalid_value", f"nested multi-properties {identifier[:50]}")
                continue
            group = self.get(identifier)
            if group is None or not len(group.materials):
                continue
            valid = (indices[:, layer] >= 0) & (indices[:, layer] < len(group.materials))
            self._warnings.add("material_missing", "layer property", int((~valid).sum()))
            chosen = np.where(valid, indices[:, layer], 0)
            method = methods[layer] if layer < len(methods) else "mix"
            if group.uv is not None:
                mixture.add_texture(int(group.materials[0]), group.uv[chosen], method)
                continue
            if source is not None and source.name == "m:colorgroup":
                rgba = self._colors(source)[chosen].astype(np.float64) / 255
                rgba[:, :3] = srgb_to_linear(rgba[:, :3])
            else:
                colors = group.colors
                rgba = np.array([self._linear(index) for index in group.materials])[chosen]
                if colors is not None:
                    rgba[:, :3] *= srgb_to_linear(colors[chosen, :3] / 255)
            mixture.add_color(rgba, method)
        material = mixture.texture
        if material is None:
            material = self._appearances.of_color(WHITE)
        return PropertyGroup(
            materials=np.full(len(rows), material),
            colors=_to_bytes(mixture.rgb, np.ones(len(rows))),
            uv=mixture.uv,
        )

    def _linear(self, material: int) -> tuple[float, float, float, float]:
        return self._appearances.materials[material].base_color

    def _color(self, text: str) -> tuple[int, ...]:
        """Parse #RRGGBB or #RRGGBBAA. An invalid colour is the default grey, with a warning."""
        match = COLOR.match(text.strip())
        if match is None:
            self._warnings.add("invalid_value", f"colour {text[:50]}")
            grey = linear_to_srgb(np.array(SceneMaterial().base_color[:3]))
            return (*(round(255 * float(value)) for value in grey), 255)
        return tuple(bytes.fromhex(match[1] + (match[2] or "FF")))

    def _number(self, text: str, default: float) -> float:
        values = self._numbers(text)
        return float(values[0]) if values else default

    def _numbers(self, text: str) -> list[float]:
        return self._parsed(text, float)

    def _integers(self, text: str) -> list[int]:
        return self._parsed(text, int)

    def _parsed(self, text: str, parse: type[int] | type[float]) -> list:
        try:
            values = [parse(word) for word in text.split()]
        except ValueError:
            self._warnings.add("invalid_value", text[:50])
            return []
        limit = 2**31
        return [value if -limit < value < limit else parse(-1) for value in values]


class _Mixture:
    """Layers of colours and textures, mixed from the bottom to the top.

    What one texture times one colour cannot express is left out with "appearance_ignored".
    """

    def __init__(self, count: int, warnings: WarningLog):
        self.rgb = np.ones((count, 3))  # linear
        self.texture: int | None = None
        self.uv: NDArray[np.float32] | None = None
        self._is_empty = True
        self._warnings = warnings

    def add_color(self, rgba: NDArray[np.float64], method: str | Literal["mix"]) -> None:
        """Add a layer of linear colours [N, 4]."""
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        if self._is_empty:
            self.rgb = rgb
        elif method == "multiply":
            self.rgb = self.rgb * rgb
        elif self.texture is None or (alpha == 1).all():
            self.texture = self.uv = None
            self.rgb = rgb * alpha + self.rgb * (1 - alpha)
        else:
            self._warnings.add("appearance_ignored", "a translucent colour over a texture")
        self._is_empty = False

    def add_texture(self, material: int, uv: NDArray[np.float32], method: str) -> None:
        """Add a layer with a texture."""
        if self.texture is not None and method == "multiply":
            self._warnings.add("appearance_ignored", "a product of two textures")
            return
        if method != "multiply":
            if not self._is_empty:
                self._warnings.add("appearance_ignored", "what lies below a texture")
            self.rgb = np.ones_like(self.rgb)
        self.texture, self.uv = material, uv
        self._is_empty = False


def _to_bytes(rgb: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return linear colours [N, 3] in [0, 1] and alpha [N] as sRGB with alpha, uint8 [N, 4]."""
    values = np.column_stack([linear_to_srgb(rgb), alpha])
    return np.rint(values * 255).clip(0, 255).astype(np.uint8)
