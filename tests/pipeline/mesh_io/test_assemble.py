"""The shared steps from a scene to a mesh: instancing, attributes, materials, axes and limits."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import Reject
from pipeline.core.schema import Material, Sampler
from pipeline.mesh_io.assemble import assemble, place_instances
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import (
    Attribute,
    Geometry,
    Node,
    Scene,
    SceneImage,
    SceneMaterial,
    TextureSlot,
)

CFG = LoadConfig()
CORNERS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
FACES = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
VOLUME = 1 / 6


def tetrahedron(**attributes) -> Geometry:
    return Geometry.from_triangles(CORNERS, FACES, **attributes)


def shift(x=0.0, y=0.0, z=0.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix


def build(scene, up="y", cfg=CFG):
    warnings = WarningLog()
    mesh = assemble(scene, cfg, warnings, up)
    return mesh, {warning.code: warning.count for warning in warnings.items()}


def volume(mesh) -> float:
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


def png(color, size=(2, 2), mode="RGBA") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, "PNG")
    return out.getvalue()


def test_a_child_is_placed_by_all_matrices_above_it():
    turn = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nodes = [
        Node(matrix=shift(x=5), children=(1,)),
        Node(matrix=turn, children=(2,)),
        Node(matrix=shift(y=2), geometries=(0,)),
    ]
    mesh, codes = build(Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0]))
    # (x, y, z) -> (x, y + 2, z) -> (-(y + 2), x, z) -> (3 - y, x, z)
    expected = np.stack([3 - CORNERS[:, 1], CORNERS[:, 0], CORNERS[:, 2]], axis=1)
    np.testing.assert_allclose(
        mesh.vertices[mesh.faces].sum(axis=(0, 1)), expected[FACES].sum(axis=(0, 1))
    )
    assert volume(mesh) == pytest.approx(VOLUME)
    assert codes == {}


def test_a_node_with_two_parents_is_drawn_twice():
    nodes = [
        Node(children=(1, 2)),
        Node(matrix=shift(x=-3), children=(3,)),
        Node(matrix=shift(x=3), children=(3,)),
        Node(geometries=(0,)),
    ]
    mesh, codes = build(Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0]))
    assert len(mesh.faces) == 8
    assert (mesh.vertices[:, 0].min(), mesh.vertices[:, 0].max()) == (-3, 4)
    assert codes == {}


def test_a_cycle_of_nodes_ends_with_a_warning():
    nodes = [Node(children=(1,)), Node(matrix=shift(x=1), geometries=(0,), children=(0,))]
    mesh, codes = build(Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0]))
    assert len(mesh.faces) == 4
    assert codes == {"node_cycle": 1}


def test_a_chain_of_nodes_takes_linear_time():
    count = 20_000
    nodes = [Node(matrix=shift(x=1), children=(k + 1,)) for k in range(count - 1)]
    nodes.append(Node(geometries=(0,)))
    scene = Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0])
    (instance,) = place_instances(scene, CFG, WarningLog())
    assert instance.matrix[0, 3] == count - 1


@pytest.mark.parametrize("with_geometry", [True, False])
def test_doubling_nodes_are_a_bomb(with_geometry):
    """Thirty levels, each drawn twice by the one above, are a billion placements."""
    nodes = [Node(children=(k + 1, k + 1)) for k in range(30)]
    nodes.append(Node(geometries=(0,) if with_geometry else ()))
    scene = Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0])
    with pytest.raises(Reject, match="too_many_faces"):
        place_instances(scene, LoadConfig(max_instances=100), WarningLog())


def test_the_limit_of_faces_counts_instances():
    nodes = [Node(geometries=(0,) * 10)]
    scene = Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0])
    assert len(build(scene, cfg=LoadConfig(max_faces=40))[0].faces) == 40
    with pytest.raises(Reject, match="too_many_faces faces=40"):
        build(scene, cfg=LoadConfig(max_faces=39))


@pytest.mark.parametrize(
    ("up", "turned"),
    [
        ("y", CORNERS),
        ("z", CORNERS[:, [0, 2, 1]] * [1, 1, -1]),
        ("x", CORNERS[:, [1, 0, 2]] * [-1, 1, 1]),
    ],
)
def test_each_up_axis_becomes_y_without_mirroring(up, turned):
    normals = Attribute(values=np.tile(np.float32([0, 0, 1]), (4, 1)))
    mesh, _ = build(Scene.of_geometries([tetrahedron(normals=normals)]), up)
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], turned[FACES])
    assert volume(mesh) == pytest.approx(VOLUME)
    up_of_file = {"x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0, 1]}[up]
    standing = Geometry.from_triangles(np.array([[0.0, 0, 0], up_of_file, [9, 9, 9]]), [[0, 1, 2]])
    mesh, _ = build(Scene.of_geometries([standing]), up)
    np.testing.assert_array_equal(mesh.vertices[1] - mesh.vertices[0], [0, 1, 0])
    z_axis = {"y": [0, 0, 1], "z": [0, 1, 0], "x": [0, 0, 1]}[up]
    (part,) = build(Scene.of_geometries([tetrahedron(normals=normals)]), up)[0].parts
    np.testing.assert_array_equal(part.normals, np.tile(np.float32(z_axis), (4, 1)))


def test_a_mirroring_node_keeps_the_faces_outward():
    nodes = [Node(matrix=np.diag([-1.0, 1, 1, 1]), geometries=(0,))]
    mesh, _ = build(Scene(geometries=[tetrahedron()], nodes=nodes, roots=[0]))
    assert volume(mesh) == pytest.approx(VOLUME)


def test_colours_of_polygons_and_corners_reach_the_right_vertices():
    red, green = [255, 0, 0, 255], [0, 255, 0, 255]
    quads = Geometry(
        positions=np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0]]),
        corners=np.array([0, 1, 2, 3, 1, 4, 5, 2]),
        contours=np.array([0, 4, 8]),
        colors=Attribute(values=np.uint8([red, green]), domain="polygon"),
        uv={0: Attribute(values=np.arange(16, dtype=np.float32).reshape(8, 2), domain="corner")},
    )
    material = SceneMaterial(base_color_texture=TextureSlot(image=0))
    images = [SceneImage(name="a", content=png((1, 2, 3, 255)))]
    scene = Scene.of_geometries([quads], materials=[material], images=images)
    scene.geometries[0] = Geometry(**{**vars(quads), "materials": 0})
    mesh, codes = build(scene)
    (part,) = mesh.parts
    is_left = mesh.vertices[mesh.faces][:, :, 0].max(axis=1) <= 1
    assert is_left.tolist() == [True, True, False, False]
    colors = part.colors[mesh.faces]
    assert (colors[is_left] == red).all()
    assert (colors[~is_left] == green).all()
    # The third corner of the second quad, (2, 1, 0), has the texture coordinates (12, 13).
    at_corner = (mesh.vertices == [2, 1, 0]).all(axis=1)
    assert part.uv[at_corner].tolist() == [[12, 13]] * at_corner.sum()
    assert codes == {}


def test_an_attribute_of_the_wrong_length_costs_itself():
    geometry = tetrahedron(colors=Attribute(values=np.zeros((3, 4), dtype=np.uint8)))
    mesh, codes = build(Scene.of_geometries([geometry]))
    assert mesh.parts[0].colors is None
    assert mesh.parts[0].material == Material()
    assert codes == {"attribute_mismatch": 1}


def test_faces_are_grouped_by_material_and_nodes_can_replace_it():
    geometry = tetrahedron(materials=np.array([0, 1, 0, 1]))
    materials = [SceneMaterial(base_color=(k / 4, 0.0, 0.0, 1.0)) for k in range(3)]
    nodes = [Node(geometries=(0,)), Node(matrix=shift(x=5), geometries=(0,), materials={1: 2})]
    scene = Scene(geometries=[geometry], nodes=nodes, roots=[0, 1], materials=materials)
    mesh, _ = build(scene)
    faces = {part.material.base_color[0]: part.faces for part in mesh.parts}
    assert {color: run.stop - run.start for color, run in faces.items()} == {
        0.0: 4,
        0.25: 2,
        0.5: 2,
    }
    assert mesh.vertices[mesh.faces[faces[0.5]]][..., 0].min() >= 5


def test_a_material_that_does_not_exist_is_reported():
    mesh, codes = build(Scene.of_geometries([tetrahedron(materials=7)]))
    assert mesh.parts[0].material == Material()
    assert codes == {"material_missing": 1}


def test_colours_without_material_are_drawn_on_white():
    colors = Attribute(values=np.full((4, 4), 200, dtype=np.uint8))
    mesh, _ = build(Scene.of_geometries([tetrahedron(colors=colors)]))
    assert mesh.parts[0].material.base_color == (1, 1, 1, 1)


def test_each_slot_has_its_own_coordinates_and_sampler():
    uv = {k: Attribute(values=np.full((4, 2), [k + 0.25, 0.5], dtype=np.float32)) for k in range(2)}
    half = np.array([[0.5, 0.0, 1.0], [0.0, 0.5, 2.0]])
    material = SceneMaterial(
        base_color_texture=TextureSlot(image=0, uv_set=1, wrap_u="mirror", nearest=True),
        emissive=(1.0, 2.0, 3.0),
        emissive_texture=TextureSlot(image=1, transform=half, wrap_v="clamp"),
    )
    images = [SceneImage(name=str(k), content=png((k, 0, 0, 255))) for k in range(2)]
    scene = Scene.of_geometries(
        [tetrahedron(uv=uv, materials=0)], materials=[material], images=images
    )
    mesh, codes = build(scene)
    (part,) = mesh.parts
    assert part.uv.tolist() == [[1.25, 0.5]] * 4
    assert part.emissive_uv.tolist() == [[1.125, 2.25]] * 4
    assert part.material.sampler == Sampler(wrap_u="mirror", nearest=True)
    assert part.material.emissive_sampler == Sampler(wrap_v="clamp")
    assert part.material.emissive == (1, 2, 3)
    assert part.material.emissive_texture[0, 0].tolist() == [1, 0, 0, 255]
    assert codes == {}


def test_a_texture_without_its_coordinates_is_reported():
    material = SceneMaterial(base_color_texture=TextureSlot(image=0, uv_set=3))
    images = [SceneImage(name="a", content=png((1, 2, 3, 255)))]
    scene = Scene.of_geometries([tetrahedron(materials=0)], materials=[material], images=images)
    mesh, codes = build(scene)
    assert mesh.parts[0].uv is None
    assert codes == {"texture_without_uv": 1}


@pytest.mark.parametrize("has_uv", [True, False])
def test_a_material_without_its_texture_has_its_own_colour(has_uv):
    texture = TextureSlot(image=0)
    material = SceneMaterial(
        base_color=(0.25, 0.5, 0.75, 0.5),
        base_color_texture=texture,
        emissive=(1.0, 1.0, 1.0),
        emissive_texture=texture,
        texture_replaces_color=True,
    )
    images = [SceneImage(name="a", content=png((1, 2, 3, 255)))]
    uv = {0: Attribute(domain="vertex", values=np.zeros((4, 2)))} if has_uv else {}
    shapes = [tetrahedron(materials=0, uv=uv)]
    mesh, codes = build(Scene.of_geometries(shapes, materials=[material], images=images))
    (part,) = mesh.parts
    if has_uv:
        assert part.material.base_color == (1.0, 1.0, 1.0, 0.5)
        assert part.material.texture[0, 0].tolist() == [1, 2, 3, 255]
        assert codes == {}
    else:
        assert part.material.base_color == (0.25, 0.5, 0.75, 0.5)
        assert part.material.texture is part.material.emissive_texture is None
        assert part.material.emissive == (0, 0, 0)
        assert codes == {"texture_without_uv": 2}


def test_opacity_images_multiply_alpha_at_the_larger_size():
    material = SceneMaterial(
        base_color_texture=TextureSlot(image=0),
        opacity_texture=TextureSlot(image=1),
        alpha_mode="MASK",
    )
    opacity = Image.fromarray(np.uint8([[0, 255], [255, 100]]), "L")
    out = io.BytesIO()
    opacity.save(out, "PNG")
    images = [
        SceneImage(name="color", content=png((10, 20, 30, 255), (1, 1))),
        SceneImage(name="opacity", content=out.getvalue()),
    ]
    uv = {0: Attribute(values=np.zeros((4, 2), dtype=np.float32))}
    scene = Scene.of_geometries(
        [tetrahedron(uv=uv, materials=0)], materials=[material], images=images
    )
    texture = build(scene)[0].parts[0].material.texture
    assert texture[..., 3].tolist() == [[0, 255], [255, 100]]
    assert (texture[..., :3] == [10, 20, 30]).all()


@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_damaged_image_costs_only_itself(content):
    material = SceneMaterial(
        base_color=(1.0, 0.0, 0.0, 1.0), base_color_texture=TextureSlot(image=0)
    )
    images = [SceneImage(name="broken.png", content=content)]
    scene = Scene.of_geometries([tetrahedron(materials=0)], materials=[material], images=images)
    mesh, codes = build(scene)
    assert mesh.parts[0].material.base_color == (1, 0, 0, 1)
    assert codes == {"image_unreadable": 1}


def test_what_is_not_drawn_is_reported():
    unplaced = tetrahedron(name="spare")
    scene = Scene(geometries=[tetrahedron(), unplaced], nodes=[Node(geometries=(0,))], roots=[0])
    assert build(scene)[1] == {"unplaced_geometry": 1}


@pytest.mark.parametrize(
    ("scene", "reason"),
    [
        (Scene(), "empty_scene"),
        (Scene(points=5), "points_only"),
        (Scene(geometries=[tetrahedron()]), "empty_scene"),
        (Scene.of_geometries([Geometry.from_triangles(CORNERS, FACES + 9)]), "index_out_of_range"),
        (Scene.of_geometries([Geometry.from_triangles(CORNERS, FACES * 0)]), "degenerate"),
        (
            Scene.of_geometries([Geometry.from_triangles(CORNERS * np.nan, FACES)]),
            "non_finite_vertices",
        ),
        (
            Scene(
                geometries=[tetrahedron()],
                nodes=[Node(matrix=np.eye(4) * 1e308, geometries=(0,), children=())],
                roots=[0],
            ),
            None,
        ),
    ],
)
def test_scenes_without_a_surface_have_a_reason(scene, reason):
    if reason is None:
        assert np.isfinite(build(scene)[0].vertices).all()
        return
    with pytest.raises(Reject) as caught:
        build(scene)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("color", "is_textured", "is_reported"),
    [((0, 0, 0, 255), True, True), ((0, 0, 1, 255), True, False), ((0, 0, 0, 255), False, False)],
)
def test_black_vertex_colors_that_hide_a_texture_are_drawn_and_reported(
    color, is_textured, is_reported
):
    geometry = tetrahedron(
        colors=Attribute(values=np.full((4, 4), color, dtype=np.uint8)),
        uv={0: Attribute(values=np.zeros((4, 2)))},
        materials=np.zeros(4, dtype=np.int64),
    )
    slot = TextureSlot(image=0) if is_textured else None
    images = [SceneImage(name="a", content=png((255, 0, 0, 255)))]
    material = SceneMaterial(base_color_texture=slot)
    scene = Scene.of_geometries([geometry], materials=[material], images=images)
    mesh, codes = build(scene)
    assert codes == ({"black_vertex_colors": 1} if is_reported else {})
    (part,) = mesh.parts
    assert part.colors is not None
    assert set(map(tuple, part.colors)) == {color}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_attributes_that_are_not_finite_are_reported(bad):
    """They became 0 without a warning. Those of vertices without faces do not matter."""
    positions = np.vstack([CORNERS, [[9.0, 9, 9]]])
    uv, normals = np.zeros((5, 2)), np.tile([0.0, 0, 1], (5, 1))
    uv[4] = normals[4] = bad
    unused = Geometry.from_triangles(
        positions,
        FACES,
        uv={0: Attribute(values=uv.copy())},
        normals=Attribute(values=normals.copy()),
    )
    assert build(Scene.of_geometries([unused]))[1] == {}
    uv[1, 0] = normals[2, 1] = bad
    used = Geometry.from_triangles(
        positions, FACES, uv={0: Attribute(values=uv)}, normals=Attribute(values=normals)
    )
    mesh, codes = build(Scene.of_geometries([used]))
    assert codes == {"invalid_value": 2}
    normals = mesh.parts[0].normals
    assert normals is not None
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("matrix", [shift(), np.diag([-1.0, 1, 1, 1])])
def test_a_vertex_without_normal_takes_that_of_its_faces(matrix):
    """It took (0, 1, 0), so that the renders showed it as if it looked up."""
    normals = np.tile([0.0, 0, -1], (4, 1))
    normals[3] = 0
    # only the faces that meet in (0, 0, 1): their area vectors sum to (0, 0, 1) / 2
    geometry = Geometry.from_triangles(CORNERS, FACES[1:], normals=Attribute(values=normals))
    scene = Scene(geometries=[geometry], nodes=[Node(matrix=matrix, geometries=(0,))], roots=[0])
    mesh, codes = build(scene)
    assert codes == {}
    top = np.flatnonzero(mesh.vertices[:, 2] == 1)
    given = mesh.parts[0].normals
    assert given is not None
    np.testing.assert_allclose(given[top], [[0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(np.delete(given, top, axis=0), [[0, 0, -1]] * 3, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "stated", "expected"),
    [
        ("base_color", (255.0, 0.5, -1.0, 1.0), (1.0, 0.5, 0.0, 1.0)),
        ("base_color", (0.1, 0.2, 0.3, 4.0), (0.1, 0.2, 0.3, 1.0)),
        ("base_color", (np.nan, 0.2, 0.3, 0.4), (0.8, 0.2, 0.3, 0.4)),
        ("metallic", 7.0, 1.0),
        ("roughness", -0.5, 0.0),
        ("roughness", np.inf, 0.8),
        ("emissive", (5.0, -1.0, 0.0), (5.0, 0.0, 0.0)),
        ("alpha_cutoff", -1.0, 0.0),
        ("normal_scale", np.nan, 1.0),
    ],
)
def test_factors_outside_of_their_range_are_reported(field, stated, expected):
    """They were cut to their range, or drawn, without a warning."""
    scene = Scene.of_geometries(
        [tetrahedron(materials=0), tetrahedron(materials=0)],
        materials=[SceneMaterial(name="m", **{field: stated})],
    )
    mesh, codes = build(scene)
    assert codes == {"invalid_value": 1}
    assert getattr(mesh.parts[0].material, field) == expected


def test_factors_that_rounding_took_out_of_their_range_are_not_reported():
    material = SceneMaterial(base_color=(1.0000001, 0, 0, 1), emissive=(9.0, 9.0, 9.0))
    scene = Scene.of_geometries([tetrahedron(materials=0)], materials=[material])
    mesh, codes = build(scene)
    assert codes == {}
    assert mesh.parts[0].material.base_color == (1, 0, 0, 1)


def test_a_matrix_with_another_last_row_is_reported_once():
    matrix = np.diag([1.0, 1, 1, 2])
    nodes = [Node(matrix=matrix, geometries=(0,)), Node(children=(0, 0))]
    mesh, codes = build(Scene(geometries=[tetrahedron()], nodes=nodes, roots=[1]))
    assert codes == {"invalid_value": 1}
    assert volume(mesh) == pytest.approx(2 * VOLUME)
