"""What the reader of FBX files knows: roles of material properties, and elements that it reads."""

from __future__ import annotations

import re

# Kinds of geometry that are no polygons.
LINES = ("Line",)
CURVES = (
    *("NurbsCurve", "NurbsSurface", "Nurbs", "NurbSurface", "NurbCurve", "TrimNurbsSurface"),
    *("Patch", "PatchSurface", "Boundary"),
)


def plain_name(name: str) -> str:
    """Return the last part of the name of a property in lower case, without separators.

    Physically based materials spell one property in many ways: "Maya|TEX_color_map",
    "3dsMax|Parameters|base_color_map", "Maya|baseColor".
    """
    return re.sub(r"[^a-z0-9]", "", name.rpartition("|")[2].lower())


# Plain name of a property with a texture -> what the texture gives.
TEXTURE_ROLES = {
    **dict.fromkeys(
        (
            *("diffusecolor", "diffuse", "diffusemap", "basecolor", "basecolormap", "colormap"),
            *("texcolormap", "basetexture", "albedo", "albedomap", "diffusecolormap", "color"),
            "texbasecolormap",
        ),
        "base",
    ),
    **dict.fromkeys(
        (
            *("emissivecolor", "emissive", "emissionmap", "emissioncolor", "emitcolormap"),
            *("texemissivemap", "emissivemap", "emission", "emissioncolormap", "emitcolor"),
            "texemissionmap",
        ),
        "emissive",
    ),
    **dict.fromkeys(
        (
            *("transparentcolor", "transparencyfactor", "opacity", "opacitymap", "cutoutmap"),
            *("alphamap", "geometryopacity", "geometryopacitymap", "texopacitymap"),
        ),
        "opacity",
    ),
    **dict.fromkeys(
        (
            *("normalmap", "normalcamera", "texnormalmap", "normmap", "normal", "geometrynormal"),
            "geometrynormalmap",
        ),
        "normal",
    ),
    **dict.fromkeys(
        (
            *("metallic", "metallicmap", "metalness", "metalnessmap", "texmetallicmap"),
            *("basemetalness", "basemetalnessmap"),
        ),
        "metallic",
    ),
    **dict.fromkeys(
        (
            "roughness",
            "roughnessmap",
            "texroughnessmap",
            "specularroughness",
            "specularroughnessmap",
        ),
        "roughness",
    ),
    **dict.fromkeys(("glossiness", "glossinessmap"), "glossiness"),
    **dict.fromkeys(
        ("aomap", "texaomap", "ambientocclusion", "ambientocclusionmap", "occlusionmap"),
        "occlusion",
    ),
}
TRANSMISSION = (
    *("transmission", "transmissionmap", "transmissioncolor", "transmissioncolormap"),
    *("transmissionweight", "transmissionweightmap", "transparencymap", "transcolormap"),
    *("transroughmap", "transiormap", "transmissionscattermap", "volumethicknessmap"),
)
# Plain names of textures that alter the look or the shape and are not drawn.
UNDRAWN_TEXTURES = frozenset(
    (
        *TRANSMISSION,
        *("displacement", "displacementmap", "displacementcolor", "vectordisplacementcolor"),
        *("displacementfactor", "baseweightmap", "base", "diffusefactor", "emissivefactor"),
        *("emissionweightmap", "emissionluminancemap"),
    )
)

# Layers of older files that give polygons further textures of colour, light or shape.
UNDRAWN_LAYERS = re.compile(
    "LayerElement(Diffuse|Emissive|Transparen(t|cy)|Displacement|VectorDisplacement).*"
)


def stated_name(name: str) -> str:
    """Return the plain name of a property, with "|" before it if it has a vendor's prefix."""
    return ("|" if "|" in name else "") + plain_name(name)


# Colours by role, the first that is stated counts: the names of the colour, and those of the
# factors that multiply it, as `stated_name` gives them.
COLORS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "base": (
        (("|basecolor",), ("|base", "|baseweight")),
        (("diffusecolor",), ("diffusefactor",)),
        (("diffuse",), ()),
    ),
    "emissive": (
        (("|emissioncolor", "|emitcolor"), ("|emission", "|emissionweight")),
        (("|emissive",), ("|emissiveintensity",)),
        (("emissivecolor",), ("emissivefactor",)),
        (("emissive",), ()),
    ),
}
# Numbers by role, likewise.
NUMBERS = {
    "opacity": ("|opacity", "|geometryopacity", "opacity"),
    "metallic": ("|metallic", "|metalness", "|basemetalness"),
    "roughness": ("|roughness", "|specularroughness"),
    "glossiness": ("|glossiness",),
    "luminance": ("|emissionluminance",),
}
# Role of a texture -> the property that switches it off, as Stingray materials have them.
SWITCHES = {
    "base": "|usecolormap",
    "emissive": "|useemissivemap",
    "metallic": "|usemetallicmap",
    "roughness": "|useroughnessmap",
    "normal": "|usenormalmap",
    "occlusion": "|useaomap",
}
UNDRAWN_VALUES = ("|transmission", "|transmissionweight", "|transparency", "|unlit")
READ_VALUES = frozenset(
    (
        *(name for kinds in COLORS.values() for names in kinds for part in names for name in part),
        *(name for names in NUMBERS.values() for name in names),
        *SWITCHES.values(),
        *UNDRAWN_VALUES,
        *("transparentcolor", "transparencyfactor", "|alphamode", "|alphacutoff", "|useglossiness"),
    )
)

# Elements that are read: the kind of the element that holds them -> their names. "" is the file.
_LAYER = ("MappingInformationType", "ReferenceInformationType", "Name")
_MESH = (
    *("Vertices", "PolygonVertexIndex", "LayerElementUV", "LayerElementColor"),
    *("LayerElementNormal", "LayerElementMaterial", "LayerElementTexture", "LayerElementHole"),
    *("LayerElementVisibility", "Shape", "Properties70", "Properties60", "Smoothness"),
)
READ_ELEMENTS: dict[str, tuple[str, ...]] = {
    "": ("GlobalSettings", "Definitions", "Objects", "Connections"),
    "Objects": (
        *("Model", "Geometry", "Material", "Texture", "LayeredTexture", "Video", "Deformer"),
        *("NodeAttribute", "CollectionExclusive", "GlobalSettings"),
    ),
    "Geometry": (*_MESH, "Indexes", "Points"),
    "Model": (*_MESH, "Hidden", "Points"),
    "LayerElementUV": (*_LAYER, "UV", "UVIndex"),
    "LayerElementColor": (*_LAYER, "Colors", "ColorIndex"),
    "LayerElementNormal": (*_LAYER, "Normals", "NormalsIndex"),
    "LayerElementMaterial": (*_LAYER, "Materials"),
    "LayerElementTexture": (*_LAYER, "TextureId"),
    "LayerElementHole": (*_LAYER, "Hole"),
    "LayerElementVisibility": (*_LAYER, "Visibility"),
    "Shape": ("Indexes", "Vertices"),
    "Material": ("Properties70", "Properties60"),
    "Texture": ("Properties70", "Properties60", "FileName", "RelativeFilename"),
    "Video": (
        "Properties70",
        "Properties60",
        "Filename",
        "FileName",
        "RelativeFilename",
        "Content",
    ),
    "Deformer": (
        *("Indexes", "Weights", "Transform", "Mode", "DeformPercent", "FullWeights"),
        *("SkinningType", "Properties70", "Properties60"),
    ),
}
# Properties that are read: the kind of the object -> their names.
READ_PROPERTIES: dict[str, tuple[str, ...]] = {
    "Model": (
        *("Lcl Translation", "Lcl Rotation", "Lcl Scaling", "RotationOffset", "RotationPivot"),
        *("ScalingOffset", "ScalingPivot", "PreRotation", "PostRotation", "RotationOrder"),
        *("RotationActive", "RotationSpaceForLimitOnly", "InheritType", "GeometricTranslation"),
        *("GeometricRotation", "GeometricScaling", "Visibility", "Visibility Inheritance", "Show"),
    ),
    "Material": (),
    "Texture": (
        *("UVSet", "Translation", "Rotation", "Scaling", "WrapModeU", "WrapModeV", "UVSwap"),
        *("TextureRotationPivot", "TextureScalingPivot"),
    ),
    "Deformer": ("DeformPercent",),
    "CollectionExclusive": ("Show",),
    "Video": ("Path", "RelPath"),
    "GlobalSettings": (
        *("UpAxis", "UpAxisSign", "FrontAxis", "FrontAxisSign", "CoordAxis", "CoordAxisSign"),
        "UnitScaleFactor",
    ),
}
# Deformers that are read.
DEFORMERS = ("Skin", "Cluster", "BlendShape", "BlendShapeChannel")
