"""Read MTL files, the material libraries of OBJ files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pipeline.core.color import srgb_to_linear
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.text import find_spelling, plain_text, spellings
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot
from pipeline.mesh_io.side_files import SideFiles

# Options of textures: name -> largest number of values.
OPTIONS = {
    "-blendu": 1,
    "-blendv": 1,
    "-boost": 1,
    "-bm": 1,
    "-cc": 1,
    "-clamp": 1,
    "-imfchan": 1,
    "-mm": 2,
    "-o": 3,
    "-s": 3,
    "-t": 3,
    "-texres": 1,
    "-type": 1,
}
NUMERIC_OPTIONS = ("-boost", "-bm", "-mm", "-o", "-s", "-t", "-texres")
CHANNELS: dict[str, Literal["auto", "r", "g", "b", "a"]] = {
    "r": "r",
    "g": "g",
    "b": "b",
    "m": "a",
    "l": "auto",
}
TEXTURES = {
    "map_kd": "base_color_texture",
    "map_d": "opacity_texture",
    "map_ke": "emissive_texture",
    "map_emissive": "emissive_texture",
    "map_pr": "roughness_texture",
    "map_pm": "metallic_texture",
    "norm": "normal_texture",
}
PACKED_TEXTURES = {  # channels of roughness, metallic and occlusion
    "map_rma": ("r", "g", "b"),
    "map_orm": ("g", "b", "r"),
}
# A line end that continues a statement. A path may end with a backslash too, and no number follows.
CONTINUED_NUMBERS = re.compile(rb"\\ *\n(?= *[-+.]?[0-9])")
# Statements that state a property of the look that is not drawn.
NOT_DRAWN = ("disp", "decal", "refl", "map_refl", "map_disp", "map_decal")


@dataclass(kw_only=True)
class _Statements:
    """The statements of one material: {keyword in lower case: the rest of the line}."""

    name: bytes
    values: dict[str, bytes] = field(default_factory=dict)


class MaterialLibrary:
    """The materials of one OBJ file and their images.

    Args:
        context: Reads the files and receives the warnings.
    """

    def __init__(self, context: ReaderContext):
        self.context = context
        self.warnings = context.warnings
        self.materials: list[SceneMaterial] = []
        self.images: list[SceneImage] = []
        self._side_files = context.side_files  # of the library that is being read
        self._numbers: dict[bytes, int] = {}
        self._images: dict[str, int] = {}

    def find(self, name: bytes) -> int | None:
        """Return the number of a material, or None. A name may be followed by a comment."""
        for spelling in (name, re.sub(rb"\s#.*", b"", name)):
            for key in (spelling.strip(), spelling.strip().lower()):
                if key in self._numbers:
                    return self._numbers[key]
        return None

    def read(self, content: bytes, side_files: SideFiles) -> None:
        """Add the materials of an MTL file. The first of several with one name counts.

        Args:
            content: The file.
            side_files: Finds its images.
        """
        self._side_files = side_files
        current: _Statements | None = None
        for line in CONTINUED_NUMBERS.sub(b" ", plain_text(content)).split(b"\n"):
            words = line.split(None, 1)
            if not words or words[0].startswith(b"#"):
                continue
            keyword = words[0].decode("latin-1").lower()
            rest = words[1].strip() if len(words) > 1 else b""
            if keyword == "newmtl":
                self._add(current)
                current = _Statements(name=rest)
            elif current is None:
                self.warnings.add("invalid_value", f"mtl: {keyword} before newmtl")
            else:
                current.values[keyword] = rest
        self._add(current)

    def _add(self, statements: _Statements | None) -> None:
        if statements is None:
            return
        name = statements.name
        if name in self._numbers:
            self.warnings.add("invalid_value", f"mtl: second material {spellings(name)[0]}")
            return
        number = len(self.materials)
        self.materials.append(self._material(statements))
        self._numbers[name] = number
        self._numbers.setdefault(name.lower(), number)

    def _material(self, statements: _Statements) -> SceneMaterial:
        values = statements.values
        slots = {}
        for keyword, target in TEXTURES.items():
            slot = self._slot(keyword, values[keyword]) if keyword in values else None
            if slot is not None:
                slots.setdefault(target, slot)
        for keyword, channels in PACKED_TEXTURES.items():
            slot = self._slot(keyword, values[keyword]) if keyword in values else None
            if slot is not None:
                for target, channel in zip(
                    ("roughness_texture", "metallic_texture", "occlusion_texture"),
                    channels,
                    strict=True,
                ):
                    slots.setdefault(target, replace(slot, channel=channel))
        has_texture = "base_color_texture" in slots
        color = self._color(values, "kd", (0.8, 0.8, 0.8))
        if has_texture and "kd" in values and len(set(color)) > 1:
            self.warnings.add("appearance_ignored", "Kd beside map_Kd")
        if "kd" not in values and not has_texture:
            color = None
        opacity = self._opacity(values)
        linear = SceneMaterial.base_color[:3] if color is None else _to_linear(color)
        emitted = self._color(values, "ke", (0.0, 0.0, 0.0))
        roughness = self._number(values, "pr", 1.0 if "roughness_texture" in slots else None)
        metallic = self._number(values, "pm", 1.0 if "metallic_texture" in slots else None)
        self._account_for_the_rest(values)
        base = slots.get("base_color_texture")
        if "opacity_texture" in slots and base is not None:
            mapping = [
                str((slot.transform, slot.wrap_u)) for slot in (base, slots["opacity_texture"])
            ]
            if mapping[0] != mapping[1]:
                self.warnings.add("appearance_ignored", "mapping of map_d other than of map_Kd")
        return SceneMaterial(
            name=spellings(statements.name)[0],
            base_color=(linear[0], linear[1], linear[2], opacity),
            texture_replaces_color=True,
            roughness=SceneMaterial.roughness if roughness is None else roughness,
            metallic=SceneMaterial.metallic if metallic is None else metallic,
            emissive=(1.0, 1.0, 1.0) if "emissive_texture" in slots else _to_linear(emitted),
            alpha_mode="BLEND" if opacity < 1 or "opacity_texture" in slots else "OPAQUE",
            **slots,
        )

    def _opacity(self, values: dict[str, bytes]) -> float:
        """Return alpha of d, or of Tr if there is no d.

        Tr is the transparency, 1 - d. Some writers write the opacity instead, which shows in Tr 1
        for materials that are meant to be seen.
        """
        if "d" in values:
            if values["d"].split()[:1] == [b"-halo"]:
                self.warnings.add("appearance_ignored", "d -halo")
                values = values | {"d": values["d"].split(None, 1)[-1]}
            opacity = self._number(values, "d", 1.0)
        else:
            transparency = self._number(values, "tr", 0.0)
            if transparency is not None and transparency >= 1:
                self.warnings.add("invalid_value", "Tr 1 without d: taken as opaque")
                transparency = 0.0
            opacity = None if transparency is None else 1 - transparency
        return 1.0 if opacity is None else opacity

    def _number(
        self, values: dict[str, bytes], keyword: str, default: float | None
    ) -> float | None:
        numbers = self._numbers_of(values, keyword)
        return numbers[0] if numbers else default

    def _color(
        self, values: dict[str, bytes], keyword: str, default: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """Return a colour. A single number is a grey."""
        numbers = self._numbers_of(values, keyword)
        if not numbers:
            return default
        if len(numbers) < 3:
            numbers = numbers[:1] * 3
        return (numbers[0], numbers[1], numbers[2])

    def _numbers_of(self, values: dict[str, bytes], keyword: str) -> list[float]:
        numbers: list[float] = []
        for word in re.sub(rb"(^|\s)#.*", b"", values.get(keyword, b"")).split():
            try:
                numbers.append(float(word.replace(b",", b".")))
            except ValueError:
                break
        if keyword in values and (not numbers or not np.isfinite(numbers).all()):
            value = values[keyword][:40].decode("latin-1")
            self.warnings.add("invalid_value", f"mtl: {keyword} {value}")
            return []
        return numbers

    def _slot(self, keyword: str, text: bytes) -> TextureSlot | None:
        """Return the slot of a texture statement, or None with a warning if there is no image."""
        name, options = self._name_and_options(keyword, text)
        if not name:
            # Some writers write the keyword of a texture that a material does not have.
            return None
        image = self._image(name)
        if image is None:
            return None
        scale, offset = np.ones(2), np.zeros(2)
        for option, target in (("-s", scale), ("-o", offset)):
            numbers = options.get(option, [])[:2]
            target[: len(numbers)] = [float(number) for number in numbers]
        transform = np.column_stack([np.diag(scale), offset])
        is_identity = np.array_equal(transform, np.eye(2, 3))
        wrap = "clamp" if options.get("-clamp") == ["on"] else "repeat"
        channel = CHANNELS.get(options.get("-imfchan", ["l"])[0])
        if channel is None:
            self.warnings.add("appearance_ignored", f"{keyword} -imfchan")
        for option, identity in (("-t", {0.0}), ("-mm", {0.0, 1.0})):
            if {float(number) for number in options.get(option, [])} - identity:
                self.warnings.add("appearance_ignored", f"{keyword} {option}")
        if options.get("-cc") == ["on"]:
            self.warnings.add("appearance_ignored", f"{keyword} -cc on")
        return TextureSlot(
            image=image,
            transform=None if is_identity else transform,
            wrap_u=wrap,
            wrap_v=wrap,
            channel=channel or "auto",
        )

    def _name_and_options(self, keyword: str, text: bytes) -> tuple[bytes, dict[str, list[str]]]:
        """Separate the file name, which may have blanks, from the options around it."""
        options: dict[str, list[str]] = {}
        rest = self._take_options(text, options)
        if self._exists(rest):
            return rest, options
        # Options after the name, a comment, and options that are not known.
        for match in re.finditer(rb"\s+(-[a-z]+\s|#)", rest):
            name = rest[: match.start()]
            if match[1] == b"#":
                if self._exists(name):
                    return name, options
            elif match[1].strip().decode("latin-1") in OPTIONS:
                self._take_options(rest[match.start() :].strip(), options)
                return name, options
        if rest.startswith(b"-"):
            words = rest.split(b" ")
            self.warnings.add("unknown_attribute", f"{keyword} {words[0].decode('latin-1')}")
            for start in range(1, len(words)):
                name = b" ".join(words[start:])
                if self._exists(name):
                    return name, options
        return rest, options

    @staticmethod
    def _take_options(text: bytes, options: dict[str, list[str]]) -> bytes:
        """Move the options at the beginning of a text to `options`, and return the rest."""
        while True:
            words = text.split(None, 1)
            option = words[0].decode("latin-1").lower() if len(words) == 2 else ""
            if option not in OPTIONS:
                return text.strip().strip(b'"')
            text = words[1]
            values = []
            for _ in range(OPTIONS[option]):
                words = text.split(None, 1)
                if len(words) < 1 or (option in NUMERIC_OPTIONS and not _is_number(words[0])):
                    break
                values.append(words[0].decode("latin-1").lower())
                text = words[1] if len(words) > 1 else b""
            options[option] = values

    def _exists(self, name: bytes) -> bool:
        return find_spelling(name, self._side_files) is not None

    def _image(self, name: bytes) -> int | None:
        side_files = self._side_files
        text = find_spelling(name, side_files)
        if text is None:
            side_files.read(spellings(name)[0])  # warns
            return None
        key = str(side_files.find(text))
        if key not in self._images:
            content = side_files.read(text)
            if content is None:
                return None
            self._images[key] = len(self.images)
            self.images.append(SceneImage(name=text, content=content))
        return self._images[key]

    def _account_for_the_rest(self, values: dict[str, bytes]) -> None:
        known = {"kd", "ke", "d", "tr", "pr", "pm", *TEXTURES, *PACKED_TEXTURES}
        ignored = {name.lower() for name in IGNORED_ELEMENTS["mtl"]}
        for keyword, rest in values.items():
            if keyword in known or keyword in ignored:
                continue
            if keyword == "tf":
                # 1 1 1 lets all colours through; 0 0 0 is written for opaque materials.
                if set(self._color(values, "tf", (1.0, 1.0, 1.0))) not in ({1.0}, {0.0}):
                    self.warnings.add("appearance_ignored", "mtl: Tf")
            elif keyword in NOT_DRAWN:
                if rest:
                    self.warnings.add("appearance_ignored", f"mtl: {keyword}")
            elif keyword == "map_ka":
                if rest and rest != values.get("map_kd"):
                    self.warnings.add("appearance_ignored", "mtl: map_Ka other than map_Kd")
            else:
                self.warnings.add("unknown_element", f"mtl: {keyword}")


def _is_number(word: bytes) -> bool:
    try:
        return np.isfinite(float(word))
    except ValueError:
        return False


def _to_linear(color: tuple[float, ...]) -> tuple[float, float, float]:
    """Convert an sRGB colour to linear light. Values above 1 of lamps continue the curve."""
    red, green, blue = srgb_to_linear(np.array(color)).tolist()
    return (red, green, blue)
