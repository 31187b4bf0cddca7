"""Materials of USD: UsdPreviewSurface, textures, bindings and what is not drawn."""

import numpy as np
import pytest

pytest.importorskip("pxr", reason="the extra usd is not installed")

from tests.pipeline.mesh_files import png
from tests.pipeline.mesh_io.measures import BOX, assert_box, colors_at, read
from tests.pipeline.mesh_io.usd_files import (
    BIND,
    BOUND,
    layer,
    material,
    mesh,
    package,
    quad,
    reader,
    root,
    texture,
)

IMAGE = "color3f inputs:diffuseColor.connect = </root/look/image.outputs:rgb>"


@pytest.fixture
def load(tmp_path):
    """Load prims below /root, with the image a.png of one colour beside the file."""

    def load_prims(*prims: str, image: bytes | None = None, **limits):
        content = png((10, 200, 30, 128)) if image is None else image
        (tmp_path / "a.png").write_bytes(content)
        found, codes = read(tmp_path, "a.usda", layer(root(*prims)), **limits)
        return found, codes

    return load_prims


def look_of(load, inputs: str, shaders: str = "", **options):
    """Return the material of a square that is bound to a preview surface, and the codes."""
    image = options.pop("image", None)
    body = options.pop("body", "")
    look = material(inputs, shaders=shaders, **options)
    found, codes = load(look, quad(BOUND + "\n" + body, metadata=BIND), image=image)
    return found.parts[0].material, found, codes


class TestPreviewSurface:
    def test_constants_are_read(self, load):
        look, _, codes = look_of(
            load,
            """color3f inputs:diffuseColor = (0.1, 0.2, 0.3)
            color3f inputs:emissiveColor = (0.4, 0.5, 0.6)
            float inputs:metallic = 0.7
            float inputs:roughness = 0.9""",
        )
        np.testing.assert_allclose(look.base_color, (0.1, 0.2, 0.3, 1))
        np.testing.assert_allclose(look.emissive, (0.4, 0.5, 0.6))
        np.testing.assert_allclose((look.metallic, look.roughness), (0.7, 0.9))
        assert (look.alpha_mode, look.texture) == ("OPAQUE", None)
        assert codes == {}

    def test_defaults_are_those_of_the_shader(self, load):
        look, _, codes = look_of(load, "")
        np.testing.assert_allclose(look.base_color, (0.18, 0.18, 0.18, 1))
        assert (look.metallic, look.roughness) == (0.0, 0.5)
        assert codes == {}

    @pytest.mark.parametrize(
        ("inputs", "mode", "alpha", "cutoff"),
        [
            ("float inputs:opacity = 0.5", "BLEND", 0.5, 0.5),
            (
                "float inputs:opacity = 0.5\nfloat inputs:opacityThreshold = 0.25",
                "MASK",
                0.5,
                0.25,
            ),
            ("float inputs:opacityThreshold = 0.25", "OPAQUE", 1, 0.25),
        ],
    )
    def test_opacity_is_blended_or_cut(self, load, inputs, mode, alpha, cutoff):
        look, _, codes = look_of(load, inputs)
        assert (look.alpha_mode, look.base_color[3], look.alpha_cutoff) == (mode, alpha, cutoff)
        assert codes == {}

    @pytest.mark.parametrize(
        ("inputs", "code"),
        [
            ("float inputs:clearcoat = 1", "appearance_ignored"),
            ("float inputs:ior = 2", "appearance_ignored"),
            ("float inputs:displacement = 1", "appearance_ignored"),
            (
                "int inputs:useSpecularWorkflow = 1\ncolor3f inputs:specularColor = (1, 1, 1)",
                "appearance_ignored",
            ),
            ("float inputs:blobs = 1", "unknown_attribute"),
        ],
    )
    def test_inputs_that_are_not_drawn_give_a_warning(self, load, inputs, code):
        assert look_of(load, inputs)[2] == {code: 1}

    def test_neutral_values_give_no_warning(self, load):
        inputs = """float inputs:clearcoat = 0
        float inputs:clearcoatRoughness = 0.1
        float inputs:ior = 1.5
        float inputs:displacement = 0
        int inputs:useSpecularWorkflow = 0
        color3f inputs:specularColor = (1, 1, 1)
        normal3f inputs:normal = (0, 0, 1)
        float inputs:occlusion = 1"""
        assert look_of(load, inputs)[2] == {}

    def test_values_come_from_the_interface_of_the_material(self, load):
        look = material("color3f inputs:diffuseColor.connect = </root/look.inputs:tint>")
        look = look.replace("{\n", "{\n    color3f inputs:tint = (1, 0, 0)\n", 1)
        found, codes = load(look, quad(BOUND, metadata=BIND))
        np.testing.assert_allclose(found.parts[0].material.base_color, (1, 0, 0, 1))
        assert codes == {}

    def test_connections_in_a_circle_end(self, load):
        look = material("color3f inputs:diffuseColor.connect = </root/look.inputs:a>").replace(
            "{\n",
            "{\n    color3f inputs:a.connect = </root/look.inputs:b>\n"
            "    color3f inputs:b.connect = </root/look.inputs:a>\n",
            1,
        )
        found, _ = load(look, quad(BOUND, metadata=BIND))
        assert len(found.faces) == 2

    @pytest.mark.parametrize("identifier", ["ND_standard_surface_surfaceshader", "Blob"])
    def test_another_shader_is_reported_and_the_display_color_drawn(self, load, identifier):
        look = material("", identifier=identifier)
        body = BOUND + "\n    color3f[] primvars:displayColor = [(1, 0, 0)]"
        found, codes = load(look, mesh(body=body, metadata=BIND))
        assert colors_at(found, BOX[0]) == {(255, 0, 0, 255)}
        assert codes == {"material_unreadable": 1}

    def test_the_preview_surface_is_chosen_beside_other_shaders(self, load):
        look = material("color3f inputs:diffuseColor = (1, 0, 0)").replace(
            "{\n", "{\n    token outputs:mtlx:surface.connect = </root/x.outputs:out>\n", 1
        )
        found, codes = load(look, quad(BOUND, metadata=BIND))
        np.testing.assert_allclose(found.parts[0].material.base_color, (1, 0, 0, 1))
        assert codes == {}

    def test_a_binding_without_material_gives_a_warning(self, load):
        found, codes = load(mesh(body=BOUND.replace("look", "gone"), metadata=BIND))
        assert_box(found)
        assert codes == {"material_missing": 1}

    def test_display_colors_are_not_drawn_over_a_material(self, load):
        body = "color3f[] primvars:displayColor = [(1, 0, 0)]"
        _, found, _ = look_of(load, "", body=body)
        assert found.parts[0].colors is None

    def test_a_primvar_gives_the_color_and_the_opacity(self, load):
        inputs = """color3f inputs:diffuseColor.connect = </root/look/tint.outputs:result>
        float inputs:opacity.connect = </root/look/alpha.outputs:result>"""
        shaders = reader("paint", name="tint", kind="float3")
        shaders += reader("clear", name="alpha", kind="float")
        body = """color3f[] primvars:paint = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)] (
            interpolation = "vertex"
        )
        float[] primvars:clear = [0, 0, 1, 1] (
            interpolation = "vertex"
        )"""
        look, found, codes = look_of(load, inputs, shaders, body=body)
        assert look.base_color == (1, 1, 1, 1)
        assert look.alpha_mode == "BLEND"
        assert colors_at(found, (1, 0, 0)) == {(0, 255, 0, 0)}
        assert colors_at(found, (1, 1, 0)) == {(0, 0, 255, 255)}
        assert codes == {}


class TestTextures:
    def test_an_image_with_its_coordinates_and_its_sampler(self, load):
        inputs = 'token inputs:wrapS = "mirror"\n token inputs:wrapT = "clamp"'
        look, found, codes = look_of(load, IMAGE, texture(inputs=inputs) + reader())
        assert look.texture[0, 0].tolist()[:3] == [10, 200, 30]
        assert (look.sampler.wrap_u, look.sampler.wrap_v) == ("mirror", "clamp")
        assert look.base_color == (1, 1, 1, 1)
        at = dict(zip(map(tuple, found.vertices.tolist()), found.parts[0].uv.tolist(), strict=True))
        assert at == {(0, 0, 0): [0, 0], (1, 0, 0): [1, 0], (1, 1, 0): [1, 1], (0, 1, 0): [0, 1]}
        assert codes == {}

    def test_another_set_of_coordinates_and_a_name_in_the_interface(self, load):
        body = """float2[] primvars:other = [(5, 5), (6, 5), (6, 6), (5, 6)] (
            interpolation = "faceVarying"
        )"""
        shaders = texture() + reader("other")
        _, found, codes = look_of(load, IMAGE, shaders, body=body)
        assert found.parts[0].uv.min() == 5
        assert codes == {}

    @pytest.mark.parametrize("name", ["st", "map1"])
    def test_a_texture_that_names_no_coordinates_reads_those_of_the_mesh(self, load, name):
        shaders = texture().replace(
            "float2 inputs:st.connect = </root/look/reader.outputs:result>", ""
        )
        look = material(IMAGE, shaders=shaders)
        found, codes = load(
            look, quad(BOUND, metadata=BIND).replace("primvars:st", f"primvars:{name}")
        )
        assert found.parts[0].uv.max(0).tolist() == [1, 1]
        assert codes == {}

    def test_a_transform_scales_then_rotates_then_translates(self, load):
        transform = """def Shader "turn"
        {
            uniform token info:id = "UsdTransform2d"
            float2 inputs:in.connect = </root/look/reader.outputs:result>
            float inputs:rotation = 90
            float2 inputs:scale = (2, 3)
            float2 inputs:translation = (10, 20)
            float2 outputs:result
        }
        """
        _, found, codes = look_of(load, IMAGE, texture(st="turn") + reader() + transform)
        at = dict(zip(map(tuple, found.vertices.tolist()), found.parts[0].uv.tolist(), strict=True))
        # (1, 1) is scaled to (2, 3), turned to (-3, 2) and moved to (7, 22).
        np.testing.assert_allclose(at[1.0, 1.0, 0.0], [7, 22], atol=1e-5)
        np.testing.assert_allclose(at[1.0, 0.0, 0.0], [10, 22], atol=1e-5)
        assert codes == {}

    def test_a_scale_becomes_a_factor_and_a_bias_changes_the_image(self, load):
        shaders = texture(inputs="float4 inputs:scale = (0.5, 1, 1, 1)") + reader()
        look, _, _ = look_of(load, IMAGE, shaders)
        np.testing.assert_allclose(look.base_color, (0.5, 1, 1, 1))
        biased = "float4 inputs:scale = (0, 0, 0, 1)\n float4 inputs:bias = (0.5, 1, 0, 0)"
        look, _, codes = look_of(load, IMAGE, texture(inputs=biased) + reader())
        assert look.texture[0, 0].tolist()[:3] == [188, 255, 0]  # linear 0.5 is 188
        assert look.base_color == (1, 1, 1, 1)
        assert codes == {}

    @pytest.mark.parametrize(("space", "expected"), [("raw", 188), ("sRGB", 128), ("auto", 128)])
    def test_linear_colors_become_srgb(self, load, space, expected):
        shaders = texture(inputs=f'token inputs:sourceColorSpace = "{space}"') + reader()
        look, _, codes = look_of(load, IMAGE, shaders, image=png((128, 128, 128, 255)))
        assert look.texture[0, 0, 0] == expected
        assert codes == {}

    @pytest.mark.parametrize(("space", "expected"), [("raw", 0.5), ("sRGB", 0.21), ("auto", 0.5)])
    def test_single_values_come_from_their_channel(self, load, space, expected):
        inputs = "float inputs:roughness.connect = </root/look/image.outputs:g>"
        shaders = texture(inputs=f'token inputs:sourceColorSpace = "{space}"') + reader()
        look, _, codes = look_of(load, inputs, shaders, image=png((9, 128, 250, 255)))
        assert look.roughness == pytest.approx(expected, abs=0.01)
        assert codes == {}

    def test_the_alpha_of_the_image_is_the_opacity_only_if_it_is_connected(self, load):
        look, _, _ = look_of(load, IMAGE, texture() + reader())
        assert look.alpha_mode == "OPAQUE"
        both = IMAGE + "\nfloat inputs:opacity.connect = </root/look/image.outputs:a>"
        look, _, codes = look_of(load, both, texture() + reader())
        assert look.alpha_mode == "BLEND"
        assert look.texture[0, 0].tolist() == [10, 200, 30, 128]
        look, _, _ = look_of(load, IMAGE + "\nfloat inputs:opacity = 0.5", texture() + reader())
        assert look.texture[0, 0].tolist() == [10, 200, 30, 255]  # 128 has no part in 0.5
        assert codes == {}

    def test_an_image_emits(self, load):
        inputs = "color3f inputs:emissiveColor.connect = </root/look/image.outputs:rgb>"
        look, found, codes = look_of(load, inputs, texture() + reader())
        assert look.emissive_texture[0, 0].tolist()[:3] == [10, 200, 30]
        assert look.emissive == (1, 1, 1)
        assert found.parts[0].emissive_uv is not None
        assert codes == {}

    def test_images_in_packages_and_in_referenced_folders_are_found(self, tmp_path):
        look = material(IMAGE, shaders=texture("tex/a.png") + reader())
        text = layer(root(look, quad(BOUND, metadata=BIND)))
        members = {"x/a.usda": text, "x/tex/a.png": png((10, 200, 30, 255))}
        found, codes = read(tmp_path, "a.usdz", package(members, tmp_path / "p"))
        assert found.parts[0].material.texture[0, 0].tolist() == [10, 200, 30, 255]
        assert codes == {}
        for name, content in members.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(data)
        outer = layer('def "root" (\n references = @x/a.usda@\n)\n{\n}\n')
        found, codes = read(tmp_path, "b.usda", outer)
        assert found.parts[0].material.texture[0, 0].tolist() == [10, 200, 30, 255]
        assert codes == {}

    @pytest.mark.parametrize("file", ["gone.png", "/etc/hostname", "../../a.png"])
    @pytest.mark.parametrize(
        ("inputs", "color"), [("float4 inputs:fallback = (1, 0, 0, 1)", 1.0), ("", 0.18)]
    )
    def test_a_missing_image_leaves_the_fallback(self, tmp_path, file, inputs, color):
        (tmp_path / "a.png").write_bytes(png())
        folder = tmp_path / "x" / "y"
        folder.mkdir(parents=True)
        look = material(IMAGE, shaders=texture(file, inputs=inputs) + reader())
        text = layer(root(look, quad(BOUND, metadata=BIND)))
        found, warned = read(folder, "a.usda", text)
        assert found.parts[0].material.texture is None
        assert found.parts[0].material.base_color[0] == pytest.approx(color)
        assert warned == {"side_file_missing": 1}

    def test_other_nodes_tiles_and_broken_images_give_warnings(self, load):
        noise = 'def Shader "image"\n{\n uniform token info:id = "Noise"\n float3 outputs:rgb\n}\n'
        assert look_of(load, IMAGE, noise)[2] == {"appearance_ignored": 1}
        _, _, codes = look_of(load, IMAGE, texture("t.<UDIM>.png") + reader())
        assert codes == {"appearance_ignored": 1, "side_file_missing": 1}
        _, _, codes = look_of(load, IMAGE, texture() + reader(), image=b"no image")
        assert codes == {"image_unreadable": 1}
        _, _, codes = look_of(load, IMAGE, texture(inputs="float inputs:blob = 1") + reader())
        assert codes == {"unknown_attribute": 1}
        _, _, codes = look_of(load, IMAGE, texture() + reader("gone"))
        assert codes == {"texture_without_uv": 1}


class TestBindings:
    def subset(self, name: str, faces: list[int], target: str = "look") -> str:
        return f"""def GeomSubset "{name}" {BIND}
        {{
            uniform token elementType = "face"
            uniform token familyName = "materialBind"
            int[] indices = {faces}
            rel material:binding = </root/{target}>
        }}
        """

    def test_subsets_have_their_materials_and_the_rest_the_display_color(self, load):
        look = material("color3f inputs:diffuseColor = (0, 1, 0)")
        body = "color3f[] primvars:displayColor = [(1, 0, 0)]\n" + self.subset("s", [0, 1])
        found, codes = load(look, mesh(body=body))
        green = [p for p in found.parts if p.material.base_color == (0, 1, 0, 1)]
        assert [p.faces.stop - p.faces.start for p in green] == [4]
        assert (green[0].colors == 255).all()
        (rest,) = [p for p in found.parts if p is not green[0]]
        assert rest.colors[0].tolist() == [255, 0, 0, 255]
        assert codes == {}

    def test_subsets_that_overlap_or_name_missing_faces_give_warnings(self, load):
        look = material("")
        body = self.subset("s", [0, 1]) + self.subset("t", [1, 99, -1])
        found, codes = load(look, mesh(body=body))
        assert_box(found)
        assert codes == {"invalid_value": 2}

    def test_instances_of_one_mesh_have_the_materials_of_their_parents(self, load):
        red = material("color3f inputs:diffuseColor = (1, 0, 0)")
        blue = material("color3f inputs:diffuseColor = (0, 0, 1)", name="blue")
        proto = f'class Xform "proto"\n{{\n{mesh()}\n}}\n'
        instances = "".join(
            f"""def Xform "{name}" (
                instanceable = true
                references = </root/proto>
                prepend apiSchemas = ["MaterialBindingAPI"]
            )
            {{
                rel material:binding = </root/{target}>
                double3 xformOp:translate = ({x}, 0, 0)
                uniform token[] xformOpOrder = ["xformOp:translate"]
            }}
            """
            for name, target, x in (("a", "look", 0), ("b", "blue", 10))
        )
        found, codes = load(red, blue, proto, instances)
        colors = {
            part.material.base_color: found.vertices[part.vertices][:, 0].min()
            for part in found.parts
        }
        assert colors == {(1, 0, 0, 1): 0, (0, 0, 1, 1): 10}
        assert codes == {}

    def test_a_binding_for_previews_comes_first(self, load):
        red = material("color3f inputs:diffuseColor = (1, 0, 0)", name="red")
        body = BOUND + "\nrel material:binding:preview = </root/red>"
        found, _ = load(material(""), red, quad(body, metadata=BIND))
        assert found.parts[0].material.base_color == (1, 0, 0, 1)
