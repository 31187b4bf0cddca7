"""Read the materials of a USD stage: UsdPreviewSurface with its textures and primvars."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pxr import Sdf, Usd, UsdShade

from pipeline.core.color import linear_to_srgb, srgb_to_linear
from pipeline.mesh_io.images import IMAGE_ERRORS, decode_image
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.usd_accounting import Accounting
from pipeline.mesh_io.readers.usd_geometry import (
    ANY_UV,
    DEFAULT_UV,
    GeometryReader,
    Tint,
)
from pipeline.mesh_io.readers.usd_layers import Layers
from pipeline.mesh_io.readers.usd_values import TIME
from pipeline.mesh_io.scene import SceneImage, SceneMaterial, TextureSlot, Wrap

PREVIEW_SURFACES = ("UsdPreviewSurface", "ND_UsdPreviewSurface_surfaceshader")
TEXTURE = "UsdUVTexture"
TRANSFORM = "UsdTransform2d"
PRIMVAR_READER = "UsdPrimvarReader_"
WRAPS: dict[str, Wrap] = {
    "repeat": "repeat",
    "mirror": "mirror",
    "clamp": "clamp",
    "black": "clamp",
    "useMetadata": "repeat",
}
CHANNELS = {"r": 0, "g": 1, "b": 2, "a": 3}
UDIM = "<UDIM>"
FIRST_TILE = "1001"
# Inputs of UsdPreviewSurface that are not drawn, with the value that has no effect.
UNDRAWN = {"clearcoat": 0.0, "ior": 1.5, "displacement": 0.0}

Use = Literal["color", "value", "data"]  # sRGB colours, linear values, or anything else


@dataclass(frozen=True, kw_only=True)
class Look:
    """A material and the primvars that it reads.

    Attributes:
        material: Index of the scene material.
        tint: The primvars that give colours.
    """

    material: int
    tint: Tint


@dataclass(frozen=True, kw_only=True)
class _Texture:
    """A texture that an input reads.

    Attributes:
        slot: How the image is read.
        scale: Factors of r, g, b and a that are left for the material.
        channel: The output that is connected: "rgb", "r", "g", "b" or "a".
        fallback: What is drawn if there is no image, or None.
    """

    slot: TextureSlot | None
    scale: tuple[float, ...]
    channel: str
    fallback: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class _Input:
    """Where the value of an input comes from: a constant, a texture or a primvar."""

    value: Any = None
    texture: _Texture | None = None
    primvar: str = ""


class Materials:
    """Converts the materials that geometry uses.

    Args:
        layers: Reads the images.
        geometry: Numbers the sets of texture coordinates.
        accounting: Receives what no part of the reader uses.
        context: The limits, and the receiver of warnings.
    """

    def __init__(
        self,
        layers: Layers,
        geometry: GeometryReader,
        accounting: Accounting,
        context: ReaderContext,
    ):
        self.layers = layers
        self.geometry = geometry
        self.accounting = accounting
        self.cfg = context.cfg
        self.warnings = context.warnings
        self.materials: list[SceneMaterial] = []
        self.images: list[SceneImage] = []
        self._looks: dict[Sdf.Path, Look | None] = {}
        self._own: dict[SceneMaterial, int] = {}
        self._contents: dict[object, bytes | None] = {}
        self._images: dict[object, int] = {}

    def add(self, material: SceneMaterial) -> int:
        """Return the index of a material that the file does not state."""
        if material not in self._own:
            self._own[material] = len(self.materials)
            self.materials.append(material)
        return self._own[material]

    def bound_look(self, prim: Usd.Prim) -> Look | None:
        """Return the look of the material that is bound to a prim or its ancestors.

        The binding for previews counts before the one for all purposes and the full one.

        Returns:
            None if there is no material, or none that can be read.
        """
        binding = UsdShade.MaterialBindingAPI(prim)
        look = None
        missing = ""
        for purpose in (UsdShade.Tokens.preview, UsdShade.Tokens.full):
            material, relationship = binding.ComputeBoundMaterial(purpose)
            if material:
                look = self._look(material.GetPrim())
            elif relationship:
                missing = str(next(iter(relationship.GetTargets()), ""))
            if look is not None:
                return look
        if missing:
            self.warnings.add("material_missing", missing)
        return None

    def _look(self, prim: Usd.Prim) -> Look | None:
        # The instances of one prim share its materials.
        source = prim.GetPrimInPrototype() if prim.IsInstanceProxy() else prim
        path = source.GetPath()
        if path not in self._looks:
            self._looks[path] = self._convert(source)
        return self._looks[path]

    def _convert(self, prim: Usd.Prim) -> Look | None:
        """Convert a material. None, with a warning, if its shader is not known."""
        self.accounting.check(prim)
        name = str(prim.GetPath())
        material = UsdShade.Material(prim)
        shader = _surface(material)
        if shader is None:
            others = [
                output.GetBaseName()
                for output in material.GetOutputs()
                if output.GetBaseName().endswith("surface") and output.HasConnectedSource()
            ]
            detail = f"{name}: {', '.join(others) or 'no surface'}"
            self.warnings.add("material_unreadable", detail)
            return None
        identifier = shader.GetShaderId()
        if identifier not in PREVIEW_SURFACES:
            self.warnings.add("material_unreadable", f"{name}: {identifier or 'no id'}")
            return None
        self.accounting.check(shader.GetPrim(), "UsdPreviewSurface")
        scene_material, tint = self._preview_surface(shader, name)
        self.materials.append(scene_material)
        return Look(material=len(self.materials) - 1, tint=tint)

    def _preview_surface(self, shader: UsdShade.Shader, name: str) -> tuple[SceneMaterial, Tint]:
        """Convert a UsdPreviewSurface."""
        for key, neutral in UNDRAWN.items():
            found = self._input(shader, key, neutral, "data")
            if found.texture is not None or found.primvar or found.value != neutral:
                self.warnings.add("appearance_ignored", f"{name}: {key}")
        diffuse = self._input(shader, "diffuseColor", (0.18, 0.18, 0.18), "color")
        metallic = self._input(shader, "metallic", 0.0, "value")
        if self._input(shader, "useSpecularWorkflow", 0, "data").value == 1:
            # The diffuse colour is that of a dielectric, as for the specular workflow of glTF.
            metallic = _Input(value=0.0)
            specular = self._input(shader, "specularColor", (0.0, 0.0, 0.0), "color")
            if specular.texture is not None or specular.primvar or any(_rgb(specular.value)):
                self.warnings.add("appearance_ignored", f"{name}: specularColor")
        roughness = self._input(shader, "roughness", 0.5, "value")
        emissive = self._input(shader, "emissiveColor", (0.0, 0.0, 0.0), "color")
        opacity = self._input(shader, "opacity", 1.0, "value")
        normal = self._input(shader, "normal", (0.0, 0.0, 1.0), "data").texture
        occlusion = self._input(shader, "occlusion", 1.0, "value").texture
        for key, found in (("metallic", metallic), ("roughness", roughness)):
            if found.primvar:
                self.warnings.add("appearance_ignored", f"{name}: {key} of a primvar")
        if emissive.primvar:
            self.warnings.add("appearance_ignored", f"{name}: emissiveColor of a primvar")

        base, base_slot = _color(diffuse)
        emitted, emissive_slot = _color(emissive)
        alpha, opacity_slot = _value(opacity, 1.0)
        metal, metallic_slot = _value(metallic, 0.0)
        rough, roughness_slot = _value(roughness, 0.5)

        threshold = self._input(shader, "opacityThreshold", 0.0, "data").value
        threshold = float(threshold) if isinstance(threshold, int | float) else 0.0
        is_opaque = opacity_slot is None and not opacity.primvar and alpha >= 1
        mode = "OPAQUE" if is_opaque else "MASK" if threshold > 0 else "BLEND"
        if mode != "OPAQUE" and base_slot is not None:
            is_alpha_of_base = opacity_slot is not None and (
                (opacity_slot.channel, opacity_slot.image) == ("a", base_slot.image)
            )
            if not is_alpha_of_base:  # the alpha of the image has no part in the opacity
                base_slot = self._without_alpha(base_slot)
        material = SceneMaterial(
            name=name,
            base_color=(*base, alpha),
            base_color_texture=base_slot,
            opacity_texture=opacity_slot,
            metallic=metal,
            roughness=rough,
            metallic_texture=metallic_slot,
            roughness_texture=roughness_slot,
            emissive=emitted,
            emissive_texture=emissive_slot,
            normal_texture=None if normal is None else normal.slot,
            occlusion_texture=None if occlusion is None else occlusion.slot,
            alpha_mode=mode,
            alpha_cutoff=threshold if threshold > 0 else 0.5,
        )
        return material, Tint(diffuse.primvar, opacity.primvar)

    def _input(self, shader: UsdShade.Shader, name: str, default: Any, use: Use) -> _Input:
        """Return where the value of an input comes from."""
        shader_input = shader.GetInput(name)
        if not shader_input:
            return _Input(value=default)
        own = shader_input.GetAttr().Get(TIME)
        own = default if own is None else own
        for attribute in UsdShade.Utils.GetValueProducingAttributes(shader_input):
            if UsdShade.Utils.GetType(attribute.GetName()) == UsdShade.AttributeType.Input:
                value = attribute.Get(TIME)
                return _Input(value=own if value is None else value)
            source = UsdShade.Shader(attribute.GetPrim())
            identifier = source.GetShaderId() if source else None
            output = attribute.GetName().rpartition(":")[2]
            if identifier == TEXTURE:
                return _Input(value=own, texture=self._texture(source, output, use))
            if identifier and identifier.startswith(PRIMVAR_READER):
                self.accounting.check(source.GetPrim(), "UsdPrimvarReader")
                primvar = self._text(source, "varname", "")
                if primvar:
                    return _Input(value=own, primvar=primvar)
                return _Input(value=self._input(source, "fallback", own, use).value)
            self.warnings.add(
                "appearance_ignored", f"{shader.GetPath()}.{name}: {identifier or 'no shader'}"
            )
            break
        return _Input(value=own)

    def _text(self, shader: UsdShade.Shader, name: str, default: str) -> str:
        value = self._input(shader, name, default, "data").value
        return str(value) if value else default

    def _texture(self, shader: UsdShade.Shader, channel: str, use: Use) -> _Texture:
        """Return the texture that an input reads."""
        self.accounting.check(shader.GetPrim(), TEXTURE)
        scale, bias = (
            tuple(float(x) for x in self._input(shader, key, default, "data").value)
            for key, default in (("scale", (1, 1, 1, 1)), ("bias", (0, 0, 0, 0)))
        )
        fallback = self._input(shader, "fallback", None, "data").value
        source, name, content = self._content(shader)
        slot = None
        if content is not None:
            space = self._text(shader, "sourceColorSpace", "auto")
            if space not in ("auto", "raw", "sRGB"):
                self.warnings.add("invalid_value", f"{shader.GetPath()}: {space}")
                space = "auto"
            if use == "data" or space == "auto" or space == ("sRGB" if use == "color" else "raw"):
                space = ""  # as the renderer reads it
            rows = slice(0, 3) if channel == "rgb" else CHANNELS.get(channel, 0)
            changes = bias if use != "data" and np.any(np.array(bias)[rows]) else None
            factor = scale if changes else (1.0,) * 4
            image = self._image(source, name, content, space, factor, changes)
            if changes:
                scale = (1.0,) * 4
            if image is not None:
                slot = self._slot(shader, image, channel)
        return _Texture(
            slot=slot,
            scale=scale,
            channel=channel,
            fallback=None if fallback is None else tuple(float(x) for x in fallback),
        )

    def _content(self, shader: UsdShade.Shader) -> tuple[object, str, bytes | None]:
        """Return (what identifies the image file, its name, its content) of a texture."""
        file = shader.GetInput("file")
        attributes = UsdShade.Utils.GetValueProducingAttributes(file) if file else []
        value = attributes[0].Get(TIME) if attributes else None
        name = str(value.path) if value is not None and isinstance(value, Sdf.AssetPath) else ""
        if not name:
            self.warnings.add("image_unreadable", f"{shader.GetPath()} names no file")
            return None, "", None
        if UDIM in name:
            self.warnings.add("appearance_ignored", f"{name}: tiles beyond the first")
            name = name.replace(UDIM, FIRST_TILE)
        layer = _layer_of(attributes[0])
        key = (name, "" if layer is None else layer.identifier)
        if key not in self._contents:
            self._contents[key] = None if layer is None else self.layers.read(layer, name)
        return key, name, self._contents[key]

    def _image(
        self,
        source: object,
        name: str,
        content: bytes,
        space: str,
        scale: tuple[float, ...],
        bias: tuple[float, ...] | None,
    ) -> int | None:
        """Return the index of an image, with its values changed if the renderer cannot do it.

        Args:
            source: What identifies the content.
            name: Name for warnings.
            content: The file.
            space: "raw" if sRGB pixels must be made of linear values, "sRGB" for the reverse, ""
                if the values are read as they are.
            scale: Factors that are applied before `bias`.
            bias: What is added to the values, or None.
        """
        key = (source, space, scale, bias)
        if key in self._images:
            return self._images[key]
        stored: bytes | NDArray[np.uint8] = content
        if space or bias:
            try:
                stored = decode_image(content, self.cfg.max_texture_side)
            except IMAGE_ERRORS as error:
                self.warnings.add("image_unreadable", f"{name}: {type(error).__name__}")
                return None
            values = stored / 255
            if space == "sRGB":
                values[..., :3] = srgb_to_linear(values[..., :3])
            if bias:
                # Colours that are read as sRGB are changed in linear light.
                is_color = not space
                if is_color:
                    values[..., :3] = srgb_to_linear(values[..., :3])
                values = np.clip(values * np.array(scale) + np.array(bias), 0, 1)
                if is_color:
                    values[..., :3] = linear_to_srgb(values[..., :3])
            if space == "raw":
                values[..., :3] = linear_to_srgb(values[..., :3])
            stored = np.rint(values * 255).astype(np.uint8)
        self._images[key] = len(self.images)
        self.images.append(SceneImage(name=name, content=stored))
        return self._images[key]

    def _without_alpha(self, slot: TextureSlot) -> TextureSlot:
        """Return a slot whose image is opaque."""
        image = self.images[slot.image]
        key = ("opaque", slot.image)
        if key not in self._images:
            content = image.content
            try:
                if isinstance(content, bytes):
                    content = decode_image(content, self.cfg.max_texture_side)
            except IMAGE_ERRORS:
                return slot  # reported when the image is used
            assert content is not None
            if (content[..., 3] == 255).all():
                return slot
            content = content.copy()
            content[..., 3] = 255
            self._images[key] = len(self.images)
            self.images.append(replace(image, content=content))
        return replace(slot, image=self._images[key])

    def _slot(self, shader: UsdShade.Shader, image: int, channel: str) -> TextureSlot:
        wraps = []
        for key in ("wrapS", "wrapT"):
            wrap = self._text(shader, key, "useMetadata")
            if wrap not in WRAPS:
                self.warnings.add("invalid_value", f"{shader.GetPath()}.{key}: {wrap}")
            wraps.append(WRAPS.get(wrap, "repeat"))
        name, transform = self._coordinates(shader)
        return TextureSlot(
            image=image,
            uv_set=self.geometry.uv_set(name),
            transform=transform,
            wrap_u=wraps[0],
            wrap_v=wraps[1],
            channel=channel if channel in CHANNELS else "auto",  # pyright: ignore[reportArgumentType]
        )

    def _coordinates(self, shader: UsdShade.Shader) -> tuple[str, NDArray[np.float64] | None]:
        """Return the primvar of a texture's coordinates, and what transforms them."""
        transform: NDArray[np.float64] | None = None
        key = "st"
        visited: set[Sdf.Path] = set()
        while shader.GetPath() not in visited:
            visited.add(shader.GetPath())
            shader_input = shader.GetInput(key)
            attributes = (
                UsdShade.Utils.GetValueProducingAttributes(shader_input) if shader_input else []
            )
            source = UsdShade.Shader(attributes[0].GetPrim()) if attributes else None
            identifier = source.GetShaderId() if source else None
            if source and identifier and identifier.startswith(PRIMVAR_READER):
                self.accounting.check(source.GetPrim(), "UsdPrimvarReader")
                return self._text(source, "varname", DEFAULT_UV), transform
            if source and identifier == TRANSFORM:
                self.accounting.check(source.GetPrim(), TRANSFORM)
                found = self._transform(source)
                transform = found if transform is None else _chained(transform, found)
                shader, key = source, "in"
                continue
            if attributes and identifier is not None:
                self.warnings.add("appearance_ignored", f"{shader.GetPath()}.{key}: {identifier}")
            break
        return ANY_UV, transform

    def _transform(self, shader: UsdShade.Shader) -> NDArray[np.float64]:
        """Return the matrix [2, 3] of a UsdTransform2d: scale, then rotate, then translate."""
        angle = np.radians(float(self._input(shader, "rotation", 0.0, "data").value))
        scale = self._input(shader, "scale", (1.0, 1.0), "data").value
        translation = self._input(shader, "translation", (0.0, 0.0), "data").value
        cosine, sine = np.cos(angle), np.sin(angle)
        linear = np.array([[cosine, -sine], [sine, cosine]]) * np.array(scale)
        return np.column_stack([linear, np.array(translation, dtype=np.float64)])


def _surface(material: UsdShade.Material) -> UsdShade.Shader | None:
    """Return the shader of a material's surface: one that is known, if there is one."""
    first = None
    for context in ("", "mtlx"):
        shader = material.ComputeSurfaceSource(context)[0]
        if shader and shader.GetShaderId() in PREVIEW_SURFACES:
            return shader
        first = first or shader
    return first or None


def _layer_of(attribute: Usd.Attribute) -> Sdf.Layer | None:
    """Return the layer that states the value of an attribute."""
    for spec in attribute.GetPropertyStack(TIME):
        if spec.HasInfo("default") or spec.HasInfo("timeSamples"):
            return spec.layer
    return None


def _rgb(value: Any) -> tuple[float, float, float]:
    red, green, blue = (float(x) for x in tuple(value)[:3])
    return red, green, blue


def _color(found: _Input) -> tuple[tuple[float, float, float], TextureSlot | None]:
    """Return the factors and the slot of a colour."""
    texture = found.texture
    if found.primvar:
        return (1.0, 1.0, 1.0), None
    if texture is None:
        return _rgb(found.value), None
    if texture.slot is None:
        return _rgb(found.value if texture.fallback is None else texture.fallback), None
    return _rgb(texture.scale), texture.slot


def _value(found: _Input, default: float) -> tuple[float, TextureSlot | None]:
    """Return the factor and the slot of a single value."""
    texture = found.texture
    if found.primvar:
        return default if default else 0.0, None
    value = float(found.value) if isinstance(found.value, int | float) else default
    if texture is None:
        return value, None
    row = CHANNELS.get(texture.channel, 0)
    if texture.slot is None:
        return value if texture.fallback is None else texture.fallback[row], None
    return texture.scale[row], texture.slot


def _chained(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the transform [2, 3] that applies `inner` first."""
    bottom = np.array([[0.0, 0.0, 1.0]])
    return outer @ np.vstack([inner, bottom])
