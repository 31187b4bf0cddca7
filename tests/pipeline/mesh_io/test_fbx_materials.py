"""FBX materials: colours, opacity, textures embedded and beside the file, and their slots."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.color import srgb_to_linear
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.mesh_files import png, write
from tests.pipeline.mesh_io.fbx_files import (
    CUBE,
    QUADS,
    binary,
    cube,
    document,
    e,
    layer,
    material,
    mesh,
    model,
    p,
    properties,
    text,
)
from tests.pipeline.mesh_io.measures import texel_at

CFG = LoadConfig()
RED, GREEN = (255, 0, 0, 255), (0, 255, 0, 255)


@pytest.fixture
def load(tmp_path):
    """Return (mesh, {code: count}) of a tree, written as binary below other files."""

    def load(tree, files=None, container=binary, name="a.fbx"):
        for path, content in (files or {}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mesh, report = load_with_report(write(path, container(tree)), CFG, root=tmp_path)
        return mesh, {warning.code: warning.count for warning in report.warnings}

    return load


def with_material(*rows, others=(), links=(), layers=()):
    """Return the cube with a material, whose key is 3."""
    return cube(others=[material(3, *rows), *others], links=[(3, 2), *links], layers=layers)


def texture(key, *children, rows=()):
    """Return a texture."""
    return e("Texture", key, "Texture::t", "", children=[properties(*rows), *children])


def video(key, *children):
    """Return an image file."""
    return e("Video", key, "Video::v", "Clip", children=children)


def uv(values=None, *, label="map1", number=0):
    """Return texture coordinates: the whole image on each quad."""
    corners = np.tile([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], (6, 1))
    values = corners if values is None else np.asarray(values, dtype=np.float64)
    arrays = ("UV", values.ravel())
    return layer("LayerElementUV", "ByPolygonVertex", "Direct", arrays, number=number, label=label)


def textured(slot="DiffuseColor", *children, rows=(), values=(), layers=None, others=(), links=()):
    """Return the cube with a texture (key 4) in a slot of its material."""
    return with_material(
        *values,
        others=[texture(4, *children, rows=rows), *others],
        links=[(4, 3, slot), *links],
        layers=[uv()] if layers is None else layers,
    )


def of_materials(mapping, numbers):
    """Return which material each polygon has."""
    values = ("Materials", np.array(numbers))
    return layer("LayerElementMaterial", mapping, "IndexToDirect", values)


def only(mesh):
    (part,) = mesh.parts
    return part.material


class TestValues:
    @pytest.mark.parametrize(
        ("rows", "color"),
        [
            ([("DiffuseColor", 0.5, 0.25, 1.0)], (0.5, 0.25, 1.0)),
            ([("Diffuse", 0.5, 0.25, 1.0)], (0.5, 0.25, 1.0)),
            ([("Maya|baseColor", 0.1, 0.2, 0.3), ("DiffuseColor", 1.0, 1.0, 1.0)], (0.1, 0.2, 0.3)),
            ([("3dsMax|Parameters|base_color", 0.1, 0.2, 0.3, 1.0)], (0.1, 0.2, 0.3)),
        ],
    )
    def test_base_colours_are_srgb(self, load, rows, color):
        mesh_, codes = load(with_material(*(p(*row) for row in rows)))
        assert codes == {}
        assert np.allclose(only(mesh_).base_color[:3], srgb_to_linear(np.array(color)))

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_numbers_that_are_not_finite_are_reported(self, load, number):
        rows = [p("DiffuseColor", number, 0.0, 0.0), p("3dsMax|main|metalness", number)]
        mesh_, codes = load(with_material(*rows))
        assert codes == {"invalid_value": 2}
        assert np.isfinite(only(mesh_).base_color).all()
        assert only(mesh_).metallic == load(with_material())[0].parts[0].material.metallic

    def test_factors_multiply_colours(self, load):
        rows = [p("DiffuseColor", 1.0, 1.0, 1.0), p("DiffuseFactor", 0.5)]
        rows += [p("EmissiveColor", 1.0, 0.0, 0.0), p("EmissiveFactor", 0.25)]
        drawn = only(load(with_material(*rows))[0])
        assert drawn.base_color[:3] == (0.5, 0.5, 0.5)
        assert drawn.emissive == (0.25, 0.0, 0.0)

    @pytest.mark.parametrize(("weight", "emitted"), [(0.0, 0.0), (1.0, 1.0)])
    def test_the_weight_of_an_emission_counts(self, load, weight, emitted):
        rows = [p("Maya|emission", weight), p("Maya|emissionColor", 1.0, 1.0, 1.0)]
        assert only(load(with_material(*rows))[0]).emissive == (emitted,) * 3

    @pytest.mark.parametrize(
        ("rows", "alpha", "codes"),
        [
            ([], 1, {}),
            ([p("TransparentColor", 1.0, 1.0, 1.0), p("TransparencyFactor", 0.0)], 1, {}),
            ([p("TransparentColor", 0.0, 0.0, 0.0), p("TransparencyFactor", 1.0)], 1, {}),
            ([p("TransparentColor", 1.0, 1.0, 1.0), p("TransparencyFactor", 0.25)], 0.75, {}),
            ([p("TransparentColor", 0.5, 0.5, 0.5)], 0.5, {}),
            ([p("TransparencyFactor", 0.25)], 0.75, {}),
            ([p("Opacity", 0.5), p("TransparencyFactor", 0.0)], 0.5, {}),
            ([p("TransparentColor", 1.0, 1.0, 1.0)], 1, {"invalid_value": 1}),
            ([p("Opacity", 0.0)], 1, {"invalid_value": 1}),
        ],
    )
    def test_opacity(self, load, rows, alpha, codes):
        mesh_, found = load(with_material(*rows))
        assert found == codes
        assert only(mesh_).base_color[3] == pytest.approx(alpha)
        assert only(mesh_).alpha_mode == ("OPAQUE" if alpha == 1 else "BLEND")

    def test_metallic_and_roughness_of_physically_based_materials(self, load):
        rows = [p("3dsMax|main|metalness", 1.0), p("3dsMax|main|roughness", 0.25)]
        drawn = only(load(with_material(*rows))[0])
        assert (drawn.metallic, drawn.roughness) == (1.0, 0.25)
        drawn = only(load(with_material(p("3dsMax|main|glossiness", 0.75)))[0])
        assert drawn.roughness == pytest.approx(0.25)

    def test_defaults_come_from_the_template(self, load):
        rows = properties(p("DiffuseColor", 1.0, 0.0, 0.0))
        template = e("PropertyTemplate", "FbxSurfacePhong", children=[rows])
        kinds = e("Definitions", children=[e("ObjectType", "Material", children=[template])])
        tree = cube(others=[material(3)], links=[(3, 2)], top=[kinds])
        assert only(load(tree)[0]).base_color[:3] == (1.0, 0.0, 0.0)

    def test_transmission_is_reported(self, load):
        assert load(with_material(p("Maya|transmission", 1.0)))[1] == {"appearance_ignored": 1}

    def test_a_property_that_the_reader_does_not_know_is_reported(self, load):
        assert load(with_material(p("Maya|mystery", 1.0)))[1] == {"unknown_attribute": 1}


class TestMaterialsOfPolygons:
    def two(self, *layers, links=((3, 2), (4, 2))):
        red = material(3, p("DiffuseColor", 1.0, 0.0, 0.0))
        green = material(4, p("DiffuseColor", 0.0, 1.0, 0.0))
        return cube(others=[red, green], links=links, layers=layers)

    def colors(self, mesh_) -> list[tuple[float, ...]]:
        """Return the colour of each quad."""
        of_face = {
            face: part.material.base_color[:3]
            for part in mesh_.parts
            for face in range(part.faces.start, part.faces.stop)
        }
        middles = mesh_.vertices[mesh_.faces].reshape(-1, 6, 3).mean(axis=1)
        expected = CUBE[QUADS].mean(axis=1)
        near = [int(np.argmin(np.abs(middles - middle).sum(axis=1))) for middle in expected]
        return [of_face[2 * pair] for pair in near]

    def test_each_polygon_has_its_material(self, load):
        layer_ = of_materials("ByPolygon", [0, 1, 0, 1, 1, 0])
        mesh_, codes = load(self.two(layer_))
        red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
        assert codes == {}
        assert self.colors(mesh_) == [red, green, red, green, green, red]

    @pytest.mark.parametrize("number", [0, 1])
    def test_one_material_for_all(self, load, number):
        layer_ = of_materials("AllSame", [number])
        mesh_, codes = load(self.two(layer_))
        assert codes == {}
        assert only(mesh_).base_color[number] == 1

    def test_without_a_layer_the_first_material_counts(self, load):
        assert only(load(self.two())[0]).base_color[:3] == (1.0, 0.0, 0.0)

    def test_a_material_that_does_not_exist_is_reported(self, load):
        layer_ = of_materials("ByPolygon", [0, 1, 0, 1, 1, 7])
        _, codes = load(self.two(layer_))
        assert codes == {"material_missing": 1}

    def test_instances_have_the_materials_of_their_nodes(self, load):
        red = material(3, p("DiffuseColor", 1.0, 0.0, 0.0))
        green = material(4, p("DiffuseColor", 0.0, 1.0, 0.0))
        other = model(5, p("Lcl Translation", 4.0, 0.0, 0.0))
        tree = document(
            [mesh(1), model(2), other, red, green],
            [(1, 2), (1, 5), (2, 0), (5, 0), (3, 2), (4, 5)],
        )
        mesh_, _ = load(tree)
        colors = {
            part.material.base_color[:3]: mesh_.vertices[part.vertices].mean(axis=0)[0]
            for part in mesh_.parts
        }
        assert colors == {(1.0, 0.0, 0.0): 0.0, (0.0, 1.0, 0.0): 4.0}


class TestTextures:
    @pytest.mark.parametrize("container", [binary, text])
    def test_an_embedded_image_is_read(self, load, container):
        tree = textured(
            others=[video(5, e("Content", png(GREEN)), e("Filename", "gone.png"))], links=[(5, 4)]
        )
        mesh_, codes = load(tree, container=container)
        assert codes == {}
        assert tuple(only(mesh_).texture[0, 0]) == GREEN

    @pytest.mark.parametrize(
        ("names", "path"),
        [
            ({"RelativeFilename": "a.png"}, "a.png"),
            ({"RelativeFilename": "..\\tex\\a.png"}, "tex/a.png"),
            ({"FileName": "C:\\Users\\x\\project\\maps\\a.png"}, "in/a.png"),
            ({"FileName": "C:\\Users\\x\\project\\maps\\A.PNG"}, "in/textures/a.png"),
            ({"FileName": "/home/x/project/maps/a.png"}, "project/maps/a.png"),
            ({"RelativeFilename": "x/gone.png", "FileName": "D:\\a.png"}, "in/a.png"),
            ({"RelativeFilename": "a.fbm\\a.png"}, "in/a.fbm/a.png"),
        ],
    )
    def test_files_are_found_by_relative_name_base_name_and_folder(self, load, names, path):
        tree = textured("DiffuseColor", *(e(key, name) for key, name in names.items()))
        if path == "a.png":
            path = "in/a.png"
        mesh_, codes = load(tree, {path: png(RED)}, name="in/a.fbx")
        assert codes == {}
        assert tuple(only(mesh_).texture[0, 0]) == RED

    def test_a_missing_file_is_reported_once(self, load):
        tree = textured("DiffuseColor", e("RelativeFilename", "a.png"), e("FileName", "C:/a.png"))
        mesh_, codes = load(tree)
        assert codes == {"side_file_missing": 1}
        assert only(mesh_).texture is None

    def test_a_damaged_image_costs_itself(self, load):
        tree = textured(others=[video(5, e("Content", b"no image"))], links=[(5, 4)])
        assert load(tree)[1] == {"image_unreadable": 1}

    def test_a_texture_replaces_the_colour_and_its_factor(self, load):
        values = [p("DiffuseColor", 0.2, 0.2, 0.2), p("DiffuseFactor", 0.8)]
        tree = textured("DiffuseColor", e("RelativeFilename", "a.png"), values=values)
        assert only(load(tree, {"a.png": png(RED)})[0]).base_color == (1, 1, 1, 1)

    @pytest.mark.parametrize(
        "slot",
        [
            *("DiffuseColor", "Maya|base_color", "Maya|TEX_color_map", "Maya|baseColor"),
            *("3dsMax|Parameters|base_color_map", "3dsMax|main|baseColorMap"),
        ],
    )
    def test_slots_of_the_base_colour(self, load, slot):
        tree = textured(slot, e("RelativeFilename", "a.png"))
        mesh_, codes = load(tree, {"a.png": png(RED)})
        assert codes == {}
        assert tuple(only(mesh_).texture[0, 0]) == RED

    def test_a_switch_of_a_stingray_material_turns_a_texture_off(self, load):
        values = [p("Maya|use_color_map", 0.0), p("Maya|base_color", 0.0, 1.0, 0.0)]
        tree = textured("Maya|TEX_color_map", e("RelativeFilename", "a.png"), values=values)
        mesh_, _ = load(tree, {"a.png": png(RED)})
        assert only(mesh_).texture is None
        assert only(mesh_).base_color == (0, 1, 0, 1)

    def test_an_emissive_texture_is_drawn(self, load):
        tree = textured("EmissiveColor", e("RelativeFilename", "a.png"))
        drawn = only(load(tree, {"a.png": png(GREEN)})[0])
        assert drawn.emissive == (1, 1, 1)
        assert tuple(drawn.emissive_texture[0, 0]) == GREEN

    @pytest.mark.parametrize("slot", ["TransparentColor", "TransparencyFactor"])
    def test_a_texture_of_the_transparency_gives_alpha(self, load, slot):
        tree = textured(slot, e("RelativeFilename", "a.png"))
        drawn = only(load(tree, {"a.png": png((9, 9, 9, 100))})[0])
        assert drawn.alpha_mode == "BLEND"
        assert drawn.texture[0, 0, 3] == 100

    def test_metallic_and_roughness_textures_give_their_means(self, load):
        tree = textured(
            "3dsMax|main|metalness_map",
            e("RelativeFilename", "m.png"),
            others=[texture(7, e("RelativeFilename", "r.png"))],
            links=[(7, 3, "3dsMax|main|roughness_map")],
        )
        files = {"m.png": png((255, 255, 255, 255)), "r.png": png((51, 51, 51, 255))}
        drawn = only(load(tree, files)[0])
        assert (drawn.metallic, drawn.roughness) == pytest.approx((1.0, 0.2))

    @pytest.mark.parametrize(
        ("slot", "codes"),
        [
            ("NormalMap", {}),
            ("Bump", {}),
            ("SpecularColor", {}),
            ("DisplacementColor", {"appearance_ignored": 1}),
            ("3dsMax|Parameters|transparency_map", {"appearance_ignored": 1}),
            ("Mystery", {"unknown_attribute": 1}),
        ],
    )
    def test_other_slots(self, load, slot, codes):
        tree = textured(slot, e("RelativeFilename", "a.png"))
        mesh_, found = load(tree, {"a.png": png(RED)})
        assert found == codes
        assert only(mesh_).texture is None

    def test_wrap_modes_and_transforms_of_texture_coordinates(self, load):
        rows = [
            p("WrapModeU", 1),
            p("WrapModeV", 0),
            p("Translation", 0.5, 0.25, 0.0),
            p("Scaling", 2.0, 3.0, 1.0),
        ]
        tree = textured("DiffuseColor", e("RelativeFilename", "a.png"), rows=rows)
        mesh_, codes = load(tree, {"a.png": png(RED)})
        (part,) = mesh_.parts
        assert codes == {}
        assert (part.material.sampler.wrap_u, part.material.sampler.wrap_v) == ("clamp", "repeat")
        assert part.uv.min(axis=0).tolist() == [0.5, 0.25]
        assert part.uv.max(axis=0).tolist() == [2.5, 3.25]

    def test_a_texture_reads_the_set_that_it_names(self, load):
        sets = [uv(np.zeros((24, 2)), label="first")]
        sets += [uv(np.ones((24, 2)), label="second", number=1)]
        tree = textured(
            "DiffuseColor", e("RelativeFilename", "a.png"), rows=[p("UVSet", "second")], layers=sets
        )
        assert load(tree, {"a.png": png(RED)})[0].parts[0].uv.min() == 1

    def test_a_texture_without_coordinates_is_reported(self, load):
        tree = textured("DiffuseColor", e("RelativeFilename", "a.png"), layers=[])
        assert load(tree, {"a.png": png(RED)})[1] == {"texture_without_uv": 1}

    def test_the_first_layer_of_a_layered_texture_is_drawn(self, load):
        tree = with_material(
            others=[
                e("LayeredTexture", 6, "LayeredTexture::l", ""),
                texture(4, e("RelativeFilename", "a.png")),
                texture(5, e("RelativeFilename", "b.png")),
            ],
            links=[(6, 3, "DiffuseColor"), (4, 6), (5, 6)],
            layers=[uv()],
        )
        mesh_, codes = load(tree, {"a.png": png(RED), "b.png": png(GREEN)})
        assert codes == {"appearance_ignored": 1}
        assert tuple(only(mesh_).texture[0, 0]) == RED

    def test_the_image_behind_a_procedural_texture_is_read(self, load):
        tree = textured(
            others=[texture(7, e("RelativeFilename", "a.png"))],
            links=[(7, 4, "3dsMax|parameters|sourceMap"), (4, 7)],  # and a cycle
        )
        mesh_, codes = load(tree, {"a.png": png(RED)})
        assert codes == {}
        assert tuple(only(mesh_).texture[0, 0]) == RED

    def test_the_colour_at_a_named_point(self, load):
        """The left half of the image is red and the right half is green, v = 0 at the bottom."""
        image = np.zeros((2, 2, 4), dtype=np.uint8)
        image[0], image[1] = (RED, GREEN), ((0, 0, 255, 255), (255, 255, 0, 255))
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        tree = textured("DiffuseColor", e("RelativeFilename", "a.png"))
        mesh_, _ = load(tree, {"a.png": file.getvalue()})
        # The second quad (z = 1) begins at (-1, -1, 1) with u = v = 0 and goes on to x = 1.
        assert texel_at(mesh_, (-0.6, -0.5, 1)) == (0, 0, 255, 255)
        assert texel_at(mesh_, (0.6, -0.5, 1)) == (255, 255, 0, 255)
        assert texel_at(mesh_, (-0.5, 0.6, 1)) == RED


class TestVersion6:
    @pytest.mark.parametrize(
        ("others", "expected"),
        [
            ((), {}),
            (("LayerElementSpecularTextures", "LayerElementBumpTextures"), {}),
            (("LayerElementEmissiveTextures",), {"appearance_ignored": 1}),
            (("LayerElementTransparentTextures",), {"appearance_ignored": 1}),
        ],
    )
    def test_a_texture_of_a_node_gives_the_colour_of_its_polygons(self, load, others, expected):
        """Other layers of textures are not drawn. Those that can alter the look are reported."""
        quad = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0]]
        node = e(
            "Model",
            "Model::Q",
            "Mesh",
            children=[
                e("Vertices", np.array(quad).ravel()),
                e("PolygonVertexIndex", np.array([0, 1, 2, -4, 1, 4, 5, -3])),
                layer("LayerElementUV", "ByPolygonVertex", "Direct", ("UV", np.full(16, 0.5))),
                layer(
                    "LayerElementTexture",
                    "ByPolygon",
                    "Direct",
                    ("TextureId", np.eye(1, 2, dtype=int)),
                ),
                *(
                    layer(name, "AllSame", "Direct", ("TextureId", np.zeros(1, int)))
                    for name in others
                ),
            ],
        )
        names = ("a.png", "b.png")
        images = [
            e("Texture", f"Texture::{name}", "Clip", children=[e("RelativeFilename", name)])
            for name in names
        ]
        links = [("Model::Q", "Model::Scene")]
        links += [(f"Texture::{name}", "Model::Q") for name in names]
        tree = document([node, *images], links, links="Connect")
        mesh_, codes = load(
            tree, {"a.png": png(RED), "b.png": png(GREEN)}, container=lambda t: text(t, 6100)
        )
        assert codes == expected
        assert texel_at(mesh_, (0.5, 0.5, 0)) == GREEN
        assert texel_at(mesh_, (1.5, 0.5, 0)) == RED
