"""The look of glTF files: colours, coordinates, samplers and materials at known values."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.schema import Material, Sampler
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.readers.gltf import read_gltf
from pipeline.mesh_io.scene import SceneMaterial
from pipeline.mesh_io.side_files import SideFiles
from tests.pipeline.mesh_files import TETRA, assert_same_triangles, glb, gltf_material, png, write
from tests.pipeline.mesh_io.gltf_files import CFG, GltfFile, by_position, codes
from tests.pipeline.mesh_io.test_images import ktx2

CORNERS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype="<f4")  # v = 0 at the top
OTHER = np.array([[0.5, 0.5], [0.25, 0.5], [0.5, 0.25], [0.75, 1.0]], dtype="<f4")
RED, BLUE = (255, 0, 0, 255), (0, 0, 255, 255)


def drawn(file: GltfFile, folder, material: dict | None = None, attributes=None, **fields):
    """Draw a tetrahedron with a material and return (part, report)."""
    if material is not None:
        fields["material"] = file.add("materials", **material)
    file.draw(file.primitive(attributes=attributes, **fields))
    mesh, report = file.load(folder)
    assert_same_triangles(mesh)
    return mesh.parts[0], report


def scene_material(file: GltfFile, folder, **material) -> SceneMaterial:
    """Read a material and return it as it stands in the scene."""
    file.draw(file.primitive(material=file.add("materials", **material)))
    path = write(folder / "a.glb", file.glb())
    warnings = WarningLog()
    context = ReaderContext(
        path=path, cfg=CFG, side_files=SideFiles(path, None, warnings), warnings=warnings
    )
    (result,) = read_gltf(path.read_bytes(), context).materials
    assert warnings.items() == ()
    return result


# Vertex colours


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize(
    ("dtype", "top"), [("f4", 1), ("u1", 255), ("u2", 65535)], ids=["float", "byte", "short"]
)
def test_colours_of_all_types_become_srgb(tmp_path, dtype, top, width):
    """Dark orange: linear 0.5, 0.1, 0.05 is sRGB 188, 89, 63."""
    linear = np.tile([0.5, 0.1, 0.05, 0.5], (4, 1))[:, :width] * top
    file = GltfFile()
    color = file.accessor(np.rint(linear) if top > 1 else linear, dtype, normalized=top > 1)
    part, report = drawn(file, tmp_path, {}, {"COLOR_0": color})
    expected = [188, 89, 63, 128 if width == 4 else 255]
    np.testing.assert_allclose(part.colors, [expected] * 4, atol=1)
    assert part.material.base_color == (1, 1, 1, 1)
    assert report.warnings == ()


def test_dark_colours_keep_their_steps(tmp_path):
    """Linear 0.001, 0.002 and 0.003 are different sRGB values."""
    linear = np.array([[0, 0, 0], [0.001] * 3, [0.002] * 3, [0.003] * 3])
    part, _ = drawn(GltfFile(), tmp_path, None, {"COLOR_0": linear})
    assert sorted(part.colors[:, 0].tolist()) == [0, 3, 7, 10]


def test_colours_beyond_the_range_are_clipped(tmp_path):
    linear = np.array([[2.0, -1.0, np.nan]] * 4)
    part, _ = drawn(GltfFile(), tmp_path, None, {"COLOR_0": linear})
    assert (part.colors == [255, 0, 0, 255]).all()


# Textures

SLOTS = {
    "base": lambda info: {"pbrMetallicRoughness": {"baseColorTexture": info}},
    "metallic": lambda info: {"pbrMetallicRoughness": {"metallicRoughnessTexture": info}},
    "roughness": lambda info: {"pbrMetallicRoughness": {"metallicRoughnessTexture": info}},
    "emissive": lambda info: {"emissiveTexture": info, "emissiveFactor": [1, 1, 1]},
    "normal": lambda info: {"normalTexture": info},
    "occlusion": lambda info: {"occlusionTexture": info},
    "diffuse": lambda info: {
        "extensions": {
            "KHR_materials_pbrSpecularGlossiness": {
                "diffuseTexture": info,
                "specularFactor": [0, 0, 0],
            }
        }
    },
    "glossiness": lambda info: {
        "extensions": {
            "KHR_materials_pbrSpecularGlossiness": {
                "specularGlossinessTexture": info,
                "specularFactor": [0, 0, 0],
            }
        }
    },
}
FIELDS = {"base": "base_color_texture", "diffuse": "base_color_texture"}


@pytest.mark.parametrize("slot", SLOTS)
def test_each_slot_has_its_set_transform_and_sampler(tmp_path, slot):
    transform = {"offset": [0.5, 0.25], "scale": [2, 4], "rotation": np.pi / 2, "texCoord": 3}
    info = {"index": 0, "texCoord": 1, "extensions": {"KHR_texture_transform": transform}}
    file = GltfFile()
    file.add("samplers", wrapS=33071, wrapT=33648, magFilter=9728, minFilter=9987)
    file.image(png(), sampler=0)
    material = scene_material(file, tmp_path, **SLOTS[slot](info))
    found = getattr(material, FIELDS.get(slot, f"{slot}_texture"))
    assert (found.image, found.uv_set) == (0, 3)
    assert (found.wrap_u, found.wrap_v, found.nearest) == ("clamp", "mirror", True)
    # By the extension's matrices (u, v) -> (4 v + 0.5, -2 u + 0.25). Ours has v = 0 at the bottom.
    for u, v in CORNERS.tolist():
        expected = [4 * v + 0.5, 1 - (-2 * u + 0.25)]
        np.testing.assert_allclose(found.transform @ [u, 1 - v, 1], expected, atol=1e-12)


@pytest.mark.parametrize("slot", ["base", "diffuse", "emissive"])
@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, [[0, 1], [1, 1], [0, 0], [1, 0]]),
        ({"texCoord": 1}, [[0.5, 0.5], [0.25, 0.5], [0.5, 0.75], [0.75, 0.0]]),
        (
            {"extensions": {"KHR_texture_transform": {"scale": [0.5, 0.5]}}},
            [[0, 1], [0.5, 1], [0, 0.5], [0.5, 0.5]],
        ),
        (
            {"extensions": {"KHR_texture_transform": {"texCoord": 1, "offset": [1, 0]}}},
            [[1.5, 0.5], [1.25, 0.5], [1.5, 0.75], [1.75, 0.0]],
        ),
    ],
)
def test_coordinates_of_the_drawn_slots(tmp_path, slot, info, expected):
    file = GltfFile()
    file.image(png(RED))
    sets = {"TEXCOORD_0": CORNERS, "TEXCOORD_1": OTHER}
    part, report = drawn(file, tmp_path, SLOTS[slot]({"index": 0} | info), sets)
    emissive = slot == "emissive"
    texture = part.material.emissive_texture if emissive else part.material.texture
    assert (texture == RED).all()
    np.testing.assert_allclose(part.emissive_uv if emissive else part.uv, expected, atol=1e-6)
    assert (part.uv if emissive else part.emissive_uv) is None
    assert report.warnings == ()


def test_base_and_emission_read_different_sets(tmp_path):
    file = GltfFile()
    file.image(png(RED))
    file.image(png(BLUE))
    material = SLOTS["base"]({"index": 0}) | SLOTS["emissive"]({"index": 1, "texCoord": 1})
    part, _ = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS, "TEXCOORD_1": OTHER})
    assert (part.material.texture == RED).all()
    assert (part.material.emissive_texture == BLUE).all()
    np.testing.assert_allclose(part.uv, CORNERS * [1, -1] + [0, 1])
    np.testing.assert_allclose(part.emissive_uv, OTHER * [1, -1] + [0, 1])


@pytest.mark.parametrize(("dtype", "top"), [("u1", 255), ("u2", 65535)], ids=["byte", "short"])
def test_normalised_coordinates_are_scaled(tmp_path, dtype, top):
    file = GltfFile()
    file.image(png())
    uv = file.accessor(np.rint(OTHER * top), dtype, normalized=True)
    part, _ = drawn(file, tmp_path, SLOTS["base"]({"index": 0}), {"TEXCOORD_0": uv})
    np.testing.assert_allclose(part.uv, OTHER * [1, -1] + [0, 1], atol=2e-3)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ({}, Sampler()),
        ({"wrapS": 10497, "wrapT": 33648}, Sampler(wrap_v="mirror")),
        ({"wrapS": 33071, "magFilter": 9729}, Sampler(wrap_u="clamp")),
        ({"magFilter": 9728}, Sampler(nearest=True)),
    ],
)
def test_samplers_reach_the_material(tmp_path, sampler, expected):
    file = GltfFile()
    file.add("samplers", **sampler)
    file.image(png(), sampler=0)
    material = SLOTS["base"]({"index": 0}) | SLOTS["emissive"]({"index": 0})
    part, report = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS})
    assert part.material.sampler == part.material.emissive_sampler == expected
    assert report.warnings == ()


def test_a_texture_without_coordinates_is_a_warning(tmp_path):
    file = GltfFile()
    file.image(png())
    part, report = drawn(file, tmp_path, SLOTS["base"]({"index": 0, "texCoord": 5}))
    assert part.uv is None
    assert codes(report) == {"texture_without_uv": 1}


# Images


def encoded(format: str, color=RED) -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {"quality": 100}
    Image.new("RGBA" if format == "WEBP" else "RGB", (8, 8), color).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("EXT_texture_webp", encoded("WEBP")),
        ("KHR_texture_basisu", ktx2(RED)),
        ("EXT_texture_avif", encoded("AVIF", RED[:3])),
        ("MSFT_texture_dds", None),
        (None, encoded("JPEG", RED[:3])),
        (None, encoded("WEBP")),  # without the extension that the format asks for
    ],
)
def test_images_of_all_formats_are_drawn(tmp_path, extension, content):
    if content is None:
        dds = io.BytesIO()
        Image.new("RGBA", (8, 8), RED).save(dds, "DDS")
        content = dds.getvalue()
    file = GltfFile()
    source = file.add("images", bufferView=file.view(content))
    if extension is None:
        file.add("textures", source=source)
    else:
        file.document |= {"extensionsUsed": [extension], "extensionsRequired": [extension]}
        file.add("textures", extensions={extension: {"source": source}})
    part, report = drawn(file, tmp_path, SLOTS["base"]({"index": 0}), {"TEXCOORD_0": CORNERS})
    np.testing.assert_allclose(part.material.texture[2, 2], RED, atol=4)
    assert report.warnings == ()


def test_an_image_that_cannot_be_read_falls_back_to_the_plain_one(tmp_path):
    file = GltfFile()
    file.image(png(BLUE), extensions={"EXT_texture_webp": {"source": 7}})
    part, _ = drawn(file, tmp_path, SLOTS["base"]({"index": 0}), {"TEXCOORD_0": CORNERS})
    assert (part.material.texture == BLUE).all()


@pytest.mark.parametrize("kind", ["data URI", "side file", "percent-encoded"])
def test_images_are_read_from_everywhere(tmp_path, kind):
    name = {"side file": "textures/my skin.png", "percent-encoded": "textures/my%20skin.png"}
    uri = name.get(kind) or "data:image/png;base64," + base64.b64encode(png(BLUE)).decode()
    (tmp_path / "textures").mkdir()
    write(tmp_path / "textures" / "my skin.png", png(BLUE))
    file = GltfFile()
    file.add("textures", source=file.add("images", uri=uri, mimeType="image/jpeg"))
    part, report = drawn(file, tmp_path, SLOTS["base"]({"index": 0}), {"TEXCOORD_0": CORNERS})
    assert (part.material.texture == BLUE).all()
    assert report.warnings == ()


def broken_images() -> dict[str, tuple[dict, str]]:
    """Return {name: (fields of the image, code)}."""
    cut = base64.b64encode(png(size=(64, 64))[:60]).decode()
    return {
        "missing file": ({"uri": "gone.png"}, "side_file_missing"),
        "no content": ({}, "image_unreadable"),
        "missing view": ({"bufferView": 99}, "image_unreadable"),
        "cut": ({"uri": f"data:image/png;base64,{cut}"}, "image_unreadable"),
        "not base64": ({"uri": "data:image/png;base64,A"}, "image_unreadable"),
        "data URI without data": ({"uri": "data:"}, "image_unreadable"),
        "no image": ({"uri": "data:text/plain,hello"}, "image_unreadable"),
        "cut ktx2": ({"uri": "data:;base64,q0tUWCAyMLsNChoK"}, "image_unreadable"),
    }


@pytest.mark.parametrize("slot", ["base", "emissive", "roughness"])
@pytest.mark.parametrize("name", broken_images())
def test_a_broken_image_costs_itself(tmp_path, name, slot):
    fields, code = broken_images()[name]
    file = GltfFile()
    file.add("textures", source=file.add("images", **fields))
    part, report = drawn(file, tmp_path, SLOTS[slot]({"index": 0}), {"TEXCOORD_0": CORNERS})
    assert part.material.texture is None
    assert part.material.emissive_texture is None
    assert part.material.emissive == (0, 0, 0)  # not the white of the factor
    assert set(codes(report)) == {code}


@pytest.mark.parametrize(
    "info", [{"index": 9}, {"index": -1}, {}, {"index": "0"}, 5, None], ids=str
)
def test_a_broken_texture_reference_costs_itself(tmp_path, info):
    file = GltfFile()
    part, report = drawn(file, tmp_path, SLOTS["base"](info), {"TEXCOORD_0": CORNERS})
    assert part.material.texture is None
    assert codes(report)["image_unreadable"] == 1


# Materials


def test_a_material_has_the_defaults_of_the_format(tmp_path):
    part, report = drawn(GltfFile(), tmp_path, {})
    assert part.material == Material(
        base_color=(1, 1, 1, 1), metallic=1.0, roughness=1.0, double_sided=False
    )
    assert report.warnings == ()


def test_a_primitive_without_material_has_the_default_of_the_project(tmp_path):
    part, report = drawn(GltfFile(), tmp_path)
    assert part.material == Material()
    assert report.warnings == ()


def test_a_material_that_does_not_exist_is_a_warning(tmp_path):
    part, report = drawn(GltfFile(), tmp_path, material=None, mode=4)
    file = GltfFile()
    file.draw(file.primitive(material=9))
    mesh, report = file.load(tmp_path)
    assert mesh.parts[0].material == part.material
    assert codes(report) == {"material_missing": 1}


def test_factors_are_not_rounded(tmp_path):
    mask = {"alphaMode": "MASK", "alphaCutoff": 0.25, "doubleSided": True}
    material = gltf_material([0.001, 0.3, 0.7, 0.123], 0.1, 0.45, **mask)
    part, _ = drawn(GltfFile(), tmp_path, material)
    assert part.material == Material(
        base_color=(0.001, 0.3, 0.7, 0.123),
        metallic=0.1,
        roughness=0.45,
        alpha_mode="MASK",
        alpha_cutoff=0.25,
        double_sided=True,
    )


@pytest.mark.parametrize("mode", ["OPAQUE", "MASK", "BLEND"])
def test_alpha_modes_are_kept(tmp_path, mode):
    assert drawn(GltfFile(), tmp_path, {"alphaMode": mode})[0].material.alpha_mode == mode


@pytest.mark.parametrize(
    "material",
    [
        {"alphaMode": "GLASS"},
        {"alphaCutoff": "half"},
        {"doubleSided": 1},
        {"emissiveFactor": [1, 1]},
        {"emissiveFactor": 1},
        {"pbrMetallicRoughness": 4},
        {"pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1]}},
        {"pbrMetallicRoughness": {"metallicFactor": None}},
        {"pbrMetallicRoughness": {"metallicFactor": True}},
        {"pbrMetallicRoughness": {"roughnessFactor": 1e400}},
    ],
    ids=str,
)
def test_an_invalid_value_of_a_material_is_a_warning(tmp_path, material):
    part, report = drawn(GltfFile(), tmp_path, material)
    assert codes(report) == {"invalid_value": 1}
    assert part.material == Material(
        base_color=(1, 1, 1, 1), metallic=1.0, roughness=1.0, double_sided=False
    )


def test_metallic_and_roughness_textures_multiply_their_factors(tmp_path):
    file = GltfFile()
    file.image(png((0, 102, 51, 255)))
    material = SLOTS["roughness"]({"index": 0})
    material["pbrMetallicRoughness"] |= {"metallicFactor": 0.5, "roughnessFactor": 0.5}
    part, _ = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS})
    assert part.material.metallic == pytest.approx(0.5 * 0.2)
    assert part.material.roughness == pytest.approx(0.5 * 0.4)


def test_emission_and_its_strength(tmp_path):
    strength = {"KHR_materials_emissive_strength": {"emissiveStrength": 4}}
    material = {"emissiveFactor": [0.5, 0.25, 0], "extensions": strength}
    part, report = drawn(GltfFile(), tmp_path, material)
    assert part.material.emissive == (2, 1, 0)
    assert report.warnings == ()


def test_an_emissive_texture_with_factor_zero_emits_nothing(tmp_path):
    file = GltfFile()
    file.image(png())
    part, report = drawn(file, tmp_path, {"emissiveTexture": {"index": 0}})
    assert part.material.emissive_texture is None
    assert report.warnings == ()


def test_unlit_materials_are_marked(tmp_path):
    part, report = drawn(GltfFile(), tmp_path, {"extensions": {"KHR_materials_unlit": {}}})
    assert part.material.unlit
    assert report.warnings == ()


def test_normal_and_occlusion_maps_are_kept_in_the_scene(tmp_path):
    file = GltfFile()
    file.image(png())
    material = scene_material(
        file,
        tmp_path,
        normalTexture={"index": 0, "scale": 0.5},
        occlusionTexture={"index": 0, "strength": 0.25, "texCoord": 1},
    )
    assert material.normal_texture.image == 0
    assert material.normal_scale == 0.5
    assert (material.occlusion_texture.uv_set, material.occlusion_texture.channel) == (1, "r")
    assert material.occlusion_strength == 0.25


def specular_glossiness(**fields) -> dict:
    return {"extensions": {"KHR_materials_pbrSpecularGlossiness": fields}}


def test_diffuse_colours_of_specular_glossiness_are_the_base(tmp_path):
    file = GltfFile()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    image = io.BytesIO()
    palette.save(image, "PNG")
    file.image(image.getvalue())
    material = specular_glossiness(
        diffuseFactor=[0.5, 1, 1, 0.25],
        diffuseTexture={"index": 0},
        specularFactor=[0, 0, 0],
        glossinessFactor=0.25,
    )
    part, report = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS})
    assert part.material.base_color == (0.5, 1, 1, 0.25)
    assert (part.material.texture == [10, 200, 30, 255]).all()
    assert (part.material.metallic, part.material.roughness) == (0, 0.75)
    assert report.warnings == ()


def test_the_alpha_of_a_glossiness_texture_multiplies_the_factor(tmp_path):
    file = GltfFile()
    file.image(png((0, 0, 0, 51)))
    material = specular_glossiness(
        specularGlossinessTexture={"index": 0}, glossinessFactor=0.5, specularFactor=[0, 0, 0]
    )
    part, _ = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS})
    assert part.material.roughness == pytest.approx(1 - 0.5 * 0.2)


def test_a_material_with_only_specular_colour_is_a_metal(tmp_path):
    file = GltfFile()
    file.image(png(RED))
    material = specular_glossiness(
        diffuseFactor=[0, 0, 0, 1],
        specularFactor=[1, 0.8, 0.3],
        specularGlossinessTexture={"index": 0},
        glossinessFactor=0.5,
    )
    part, _ = drawn(file, tmp_path, material, {"TEXCOORD_0": CORNERS})
    assert part.material.base_color == (1, 0.8, 0.3, 1)
    assert (part.material.texture == RED).all()
    assert (part.material.metallic, part.material.roughness) == (1, 0.5)


def test_a_specular_colour_beside_a_diffuse_one_is_a_warning(tmp_path):
    part, report = drawn(GltfFile(), tmp_path, specular_glossiness(specularFactor=[0.5, 0.1, 0.1]))
    assert part.material.base_color == (1, 1, 1, 1)
    assert codes(report) == {"appearance_ignored": 1}


UNDRAWN = {
    "KHR_materials_clearcoat": ({"clearcoatFactor": 1}, {"clearcoatRoughnessFactor": 1}),
    "KHR_materials_transmission": ({"transmissionFactor": 0.5}, {"transmissionFactor": 0}),
    "KHR_materials_sheen": ({"sheenColorFactor": [0, 0, 1]}, {"sheenRoughnessFactor": 1}),
    "KHR_materials_specular": ({"specularColorFactor": [1, 0, 0]}, {"specularFactor": 1}),
    "KHR_materials_ior": ({"ior": 2.4}, {"ior": 1.5}),
    "KHR_materials_volume": ({"thicknessFactor": 1}, {}),
    "KHR_materials_iridescence": ({"iridescenceFactor": 1}, {}),
    "KHR_materials_anisotropy": ({"anisotropyStrength": 1}, {}),
    "KHR_materials_dispersion": ({"dispersion": 1}, {}),
    "KHR_materials_diffuse_transmission": ({"diffuseTransmissionFactor": 1}, {}),
}


@pytest.mark.parametrize("name", UNDRAWN)
def test_properties_that_are_not_drawn_are_a_warning_where_they_have_an_effect(tmp_path, name):
    for fields, expected in zip(UNDRAWN[name], ({"appearance_ignored": 1}, {}), strict=True):
        file = GltfFile(extensionsUsed=[name], extensionsRequired=[name])
        _, report = drawn(file, tmp_path, {"extensions": {name: fields}})
        assert codes(report) == expected


def test_variants_leave_the_default_material(tmp_path):
    file = GltfFile(
        extensionsUsed=["KHR_materials_variants"],
        extensions={"KHR_materials_variants": {"variants": [{"name": "blue"}]}},
    )
    blue = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 1, 1]}}
    file.add("materials", **blue)
    mappings = {"mappings": [{"material": 0, "variants": [0]}]}
    part, report = drawn(file, tmp_path, {}, extensions={"KHR_materials_variants": mappings})
    assert part.material.base_color == (1, 1, 1, 1)
    assert report.warnings == ()


def test_primitives_with_equal_materials_form_one_part(tmp_path):
    file = GltfFile()
    material = file.add("materials")
    file.draw(*(file.primitive(TETRA + k, material=material) for k in range(3)))
    mesh, _ = file.load(tmp_path)
    assert len(mesh.parts) == 1


def test_the_same_scene_as_text_and_as_binary_is_equal(tmp_path):
    file = GltfFile()
    file.image(png(BLUE))
    material = file.add("materials", **SLOTS["base"]({"index": 0}))
    file.draw(file.primitive(attributes={"TEXCOORD_0": CORNERS}, material=material))
    meshes = [
        load_with_report(write(tmp_path / name, content), CFG)[0]
        for name, content in (("a.gltf", file.text()), ("a.glb", file.glb()))
    ]
    first, second = (
        (by_position(mesh, mesh.parts[0].uv), mesh.parts[0].material.texture.tolist())
        for mesh in meshes
    )
    assert first == second
    assert glb(file.document, file.data) == file.glb()


@pytest.mark.parametrize("value", [5, "white", None, [1]])
def test_a_value_of_another_type_in_a_look_that_is_not_drawn_costs_nothing(tmp_path, value):
    """The asset was unreadable."""
    material = {"extensions": {"KHR_materials_sheen": {"sheenColorFactor": value}}}
    _, report = drawn(GltfFile(), tmp_path, material)
    assert codes(report) == {"appearance_ignored": 1}
