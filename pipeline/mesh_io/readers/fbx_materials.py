"""Read the materials, textures and images of FBX files.

Colours are read as sRGB, as most programs write what their users see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from pipeline.core.color import srgb_to_linear
from pipeline.mesh_io.readers.fbx_document import FbxDocument, FbxObject
from pipeline.mesh_io.readers.fbx_schema import (
    COLORS,
    NUMBERS,
    SWITCHES,
    TEXTURE_ROLES,
    plain_name,
    stated_name,
)
from pipeline.mesh_io.readers.fbx_transforms import euler
from pipeline.mesh_io.readers.fbx_tree import embedded_bytes
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot, Wrap

# Values of alphaMode in the glTF material of 3ds Max.
ALPHA_MODES: dict[int, Literal["OPAQUE", "MASK", "BLEND"]] = {1: "OPAQUE", 2: "MASK", 3: "BLEND"}
NITS_OF_WHITE = 1000.0  # luminance of OpenPBR materials that is drawn as full brightness
Color = tuple[float, float, float]


class MaterialReader:
    """Reads each material when it is needed.

    Args:
        document: The document.
        find_file: Returns whether there is a side file with a name.
        read_file: Returns the content of a side file, or None after a warning.
    """

    def __init__(
        self,
        document: FbxDocument,
        find_file: Callable[[str], object],
        read_file: Callable[[str], bytes | None],
    ):
        self.materials: list[SceneMaterial] = []
        self.images: list[SceneImage] = []
        self._document = document
        self._warnings = document.warnings
        self._find_file = find_file
        self._read_file = read_file
        self._known: dict[object, int] = {}
        self._image_of: dict[int, int | None] = {}

    def material(
        self, item: FbxObject | None, texture: FbxObject | None, uv_names: Mapping[str, int]
    ) -> int:
        """Return the index of a material in `materials`, -1 without material and texture.

        Args:
            item: The material.
            texture: A texture of its node, as version 6 has them. It gives the base colour.
            uv_names: Numbers of the sets of texture coordinates by name.
        """
        if item is None and texture is None:
            return -1
        key = (id(item), id(texture), tuple(sorted(uv_names.items())))
        if key not in self._known:
            self.materials.append(self._read(item, texture, uv_names))
            self._known[key] = len(self.materials) - 1
        return self._known[key]

    def _read(
        self, item: FbxObject | None, texture: FbxObject | None, uv_names: Mapping[str, int]
    ) -> SceneMaterial:
        slots = {} if item is None else self._slots(item, uv_names)
        if texture is not None and "base" not in slots:
            slot = self._slot(texture, uv_names)
            if slot is not None:
                slots["base"] = slot
        values = {} if item is None else stated_values(item)
        default = SceneMaterial()
        base = _color(values, "base") or (default.base_color[:3] if item else (1.0, 1.0, 1.0))
        emissive = _color(values, "emissive") or (0.0, 0.0, 0.0)
        if "emissive" in slots:
            emissive = (1.0, 1.0, 1.0)
        opacity = 1.0 if item is None else self._opacity(item, values)
        glossiness = _number(values, "glossiness")
        roughness = _share(_number(values, "roughness"), default.roughness)
        if glossiness is not None:
            roughness = 1 - _share(glossiness, 0.0)
        has_roughness = "roughness" in slots
        if has_roughness or "glossiness" in slots:
            roughness = 1.0 if has_roughness else 0.0
        metallic = _share(_number(values, "metallic"), default.metallic)
        mode = int(values.get("|alphamode", [0.0])[0])
        is_translucent = opacity < 1 or "opacity" in slots
        return SceneMaterial(
            name="" if item is None else item.name,
            base_color=(*base, opacity),
            base_color_texture=slots.get("base"),
            texture_replaces_color=True,
            opacity_texture=slots.get("opacity"),
            metallic=1.0 if "metallic" in slots else metallic,
            roughness=roughness,
            metallic_texture=slots.get("metallic"),
            roughness_texture=slots.get("roughness"),
            glossiness_texture=None if has_roughness else slots.get("glossiness"),
            emissive=emissive,
            emissive_texture=slots.get("emissive"),
            normal_texture=slots.get("normal"),
            occlusion_texture=slots.get("occlusion"),
            alpha_mode=ALPHA_MODES.get(mode, "BLEND" if is_translucent else "OPAQUE"),
            alpha_cutoff=_share(values.get("|alphacutoff", [0.5])[0], 0.5),
        )

    def _slots(self, item: FbxObject, uv_names: Mapping[str, int]) -> dict[str, TextureSlot]:
        """Return the textures of a material by role, the first of several."""
        slots: dict[str, TextureSlot] = {}
        values = stated_values(item)
        for source, name in item.sources:
            if source.kind not in ("Texture", "LayeredTexture"):
                continue
            role = TEXTURE_ROLES.get(plain_name(name))
            if role is None or role in slots:
                continue  # accounted for by name
            if not values.get(SWITCHES.get(role, ""), [1.0])[0]:
                continue  # switched off
            for texture in self._textures(source):
                slot = self._slot(texture, uv_names)
                if slot is not None:
                    slots[role] = slot
                    break
        return slots

    def _textures(self, source: FbxObject) -> Iterator[FbxObject]:
        """Yield a texture, or the first texture of a layered one."""
        if source.kind == "Texture":
            yield _image_texture(source)
            return
        layers = list(source.all_sources("Texture"))
        if len(layers) > 1:
            self._warnings.add("appearance_ignored", f"{source.name}: {len(layers)} layers")
        yield from map(_image_texture, layers[:1])

    def _slot(self, texture: FbxObject, uv_names: Mapping[str, int]) -> TextureSlot | None:
        """Return how a texture reads its image, or None after a warning."""
        image = self._image(texture)
        if image is None:
            return None
        uv_set = uv_names.get(texture.text("UVSet"), 0)
        wraps: list[Wrap] = [
            "clamp" if texture.number(name, 0) == 1 else "repeat"
            for name in ("WrapModeU", "WrapModeV")
        ]
        return TextureSlot(
            image=image,
            uv_set=uv_set,
            transform=_uv_transform(texture),
            wrap_u=wraps[0],
            wrap_v=wraps[1],
        )

    def _image(self, texture: FbxObject) -> int | None:
        """Return the index of the image of a texture, or None after a warning."""
        video = next(iter(texture.all_sources("Video")), None)
        owner = texture if video is None else video
        if id(owner) not in self._image_of:
            self._image_of[id(owner)] = None
            content, name = self._content(texture, video)
            if content is not None:
                self.images.append(SceneImage(name=name, content=content))
                self._image_of[id(owner)] = len(self.images) - 1
        return self._image_of[id(owner)]

    def _content(self, texture: FbxObject, video: FbxObject | None) -> tuple[bytes | None, str]:
        """Return the image file of a texture, embedded or beside the file, and its name."""
        names = _file_names(texture, video)
        if video is not None:
            try:
                content = embedded_bytes(video.element.first("Content"))
            except ValueError as error:
                self._warnings.add("image_unreadable", f"{video.name}: {error}")
                content = None
            if content is not None:
                return content, names[0] if names else video.name
        for name in names:
            if self._find_file(name) is not None:
                return self._read_file(name), name
        if names:
            return self._read_file(names[0]), names[0]  # warns
        self._warnings.add("image_unreadable", f"{texture.name}: no file")
        return None, texture.name

    def _opacity(self, item: FbxObject, values: Mapping[str, list[float]]) -> float:
        """Return the opacity of a material.

        It is the stated opacity, otherwise 1 - transparency, which is a colour times a factor.
        """
        opacity = _number(values, "opacity")
        if opacity is None:
            color = values.get("transparentcolor", [1.0])
            factor = values.get(
                "transparencyfactor", [1.0 if "transparentcolor" in values else 0.0]
            )
            opacity = 1 - float(np.mean(color[:3])) * factor[0]
        if opacity <= 0:
            # Writers confuse transparency and opacity, and nobody stores what cannot be seen.
            self._warnings.add("invalid_value", f"{item.name}: opacity 0 read as opaque")
            return 1.0
        # Rounded numbers such as 0.9999 mean an opaque surface.
        return 1.0 if 0.999 < opacity < 1.001 else opacity


def stated_values(item: FbxObject) -> dict[str, list[float]]:
    """Return {name as `stated_name` gives it: finite numbers} of the properties of a material."""
    values: dict[str, list[float]] = {}
    for name, stated in item.properties.items():
        numbers = [float(value) for value in stated if isinstance(value, int | float)]
        if numbers and np.isfinite(numbers).all():
            values[stated_name(name)] = numbers
    return values


def _number(values: Mapping[str, list[float]], role: str) -> float | None:
    """Return a number by role, the mean of a colour, or None if it is not stated."""
    stated = next((values[name] for name in NUMBERS[role] if name in values), None)
    return None if stated is None else float(np.mean(stated[:3]))


def _color(values: Mapping[str, list[float]], role: str) -> Color | None:
    """Return a colour times its factor as linear RGB, or None if it is not stated."""
    for names, factors in COLORS[role]:
        color = next((values[name] for name in names if len(values.get(name, ())) >= 3), None)
        if color is None:
            continue
        factor = next((values[name][0] for name in factors if name in values), 1.0)
        if role == "emissive" and "|emissionluminance" in values and names[0].startswith("|"):
            factor *= values["|emissionluminance"][0] / NITS_OF_WHITE
        linear = srgb_to_linear(np.array(color[:3])) * factor
        red, green, blue = linear.tolist()
        return red, green, blue
    return None


def _share(value: float | None, default: float) -> float:
    return default if value is None else value


def _image_texture(texture: FbxObject) -> FbxObject:
    """Return the texture that names an image in the graph of a procedural texture, or itself."""
    pending, visited = [texture], {id(texture)}
    while pending:
        item = pending.pop(0)
        if _file_names(item) or any(item.all_sources("Video")):
            return item
        for source in item.all_sources("Texture"):
            if id(source) not in visited:
                visited.add(id(source))
                pending.append(source)
    return texture


def _file_names(*items: FbxObject | None) -> list[str]:
    """Return the names of the image files that textures and videos state."""
    return [
        name
        for item in items
        if item is not None
        for key in ("RelativeFilename", "FileName", "Filename")
        if (name := item.element.text_of(key) or item.text(key))
    ]


def _uv_transform(texture: FbxObject) -> np.ndarray | None:
    """Return the matrix [2, 3] of texture coordinates, None for the identity."""
    scaling = texture.vector("Scaling", (1.0, 1.0, 1.0))
    rotation = texture.vector("Rotation")
    translation = texture.vector("Translation")
    pivot = texture.vector("TextureRotationPivot")
    scale_pivot = texture.vector("TextureScalingPivot")
    turn = euler(rotation)
    linear = turn @ np.diag(scaling)
    point = scale_pivot - scaling * scale_pivot
    point = pivot + turn @ (point - pivot) + translation
    matrix = np.column_stack([linear[:2, :2], point[:2]])
    if texture.number("UVSwap", 0):
        matrix = matrix[:, [1, 0, 2]]
    return None if np.allclose(matrix, np.eye(2, 3)) else matrix
