"""Transparent faces and outline hulls count for no product."""

import numpy as np
import pytest

from pipeline.core.errors import Reject
from pipeline.core.schema import Material, Mesh, Part, Sampler
from pipeline.mesh_io import visible_parts
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.visible_parts import keep_visible

ORANGE = Material(base_color=(1.0, 0.4, 0.0, 1.0), double_sided=False)
BLACK = Material(base_color=(0.0, 0.0, 0.0, 1.0), double_sided=False)
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
BOX = np.array([t for a, b, c, d in SIDES for t in ((a, b, c), (a, c, d))])


def box(half, *, inverted=False):
    """Return vertices and faces of a box around the origin. Its faces point outwards."""
    return CORNERS * np.asarray(half, float), BOX[:, ::-1] if inverted else BOX


def mesh_of(*pieces):
    """Join (vertices, faces, material, further arrays of the part) to a mesh with parts."""
    vertices, faces, parts, v, f = [], [], [], 0, 0
    for positions, triangles, material, *more in pieces:
        vertices.append(positions)
        faces.append(triangles + v)
        parts.append(
            Part(
                vertices=slice(v, v + len(positions)),
                faces=slice(f, f + len(triangles)),
                material=material,
                **(more[0] if more else {}),
            )
        )
        v, f = v + len(positions), f + len(triangles)
    return Mesh(
        vertices=np.concatenate(vertices),
        faces=np.concatenate(faces).astype(np.int32),
        parts=tuple(parts),
    )


def keep(mesh):
    """Return the visible mesh, its translucent share and {code: count} of the warnings."""
    log = WarningLog()
    visible, share = keep_visible(mesh, log)
    return visible, share, {warning.code: warning.count for warning in log.items()}


def volume(mesh):
    a, b, c = mesh.vertices[mesh.faces].transpose(1, 0, 2)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def quad(uv, material, **arrays):
    """Return a mesh of one square of area 1 with texture coordinates."""
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    triangles = np.array([[0, 1, 2], [0, 2, 3]])
    return mesh_of((square, triangles, material, {"uv": np.array(uv, np.float32), **arrays}))


UNIT = [[0, 0], [1, 0], [1, 1], [0, 1]]


def half_transparent(height=16):
    """Return a texture whose left half is transparent."""
    texture = np.full((height, 32, 4), 255, np.uint8)
    texture[:, :16, 3] = 0
    return texture


@pytest.mark.parametrize("gap", [1.005, 1.04])
def test_an_outline_hull_is_left_out(gap):
    mesh, _, codes = keep(
        mesh_of((*box([0.5] * 3), ORANGE), (*box([0.5 * gap] * 3, inverted=True), BLACK))
    )
    assert volume(mesh) == pytest.approx(1.0)
    assert [part.material for part in mesh.parts] == [ORANGE]
    assert codes == {"outline_hull_left_out": 12}


def test_an_outline_hull_in_the_part_of_its_object_is_left_out():
    inner, hull = box([0.5] * 3), box([0.52] * 3, inverted=True)
    both = np.concatenate([inner[0], hull[0]]), np.concatenate([inner[1], hull[1] + 8])
    mesh, _, codes = keep(mesh_of((*both, BLACK)))
    assert volume(mesh) == pytest.approx(1.0)
    assert codes == {"outline_hull_left_out": 12}


@pytest.mark.parametrize(
    "pieces",
    [
        [(*box([0.5] * 3, inverted=True), ORANGE)],  # merely inside out
        [  # two parts, both inside out
            (*box([0.5] * 3, inverted=True), ORANGE),
            (*box([0.52] * 3, inverted=True), BLACK),
        ],
        [  # a hollow wall: the inner surface faces the cavity
            (*box([0.5] * 3), ORANGE),
            (*box([0.48] * 3, inverted=True), BLACK),
        ],
        [  # a room seen from the inside, with a box that stands in it
            (*box([3.0] * 3, inverted=True), BLACK),
            (*box([0.5] * 3), ORANGE),
        ],
        [  # a double-sided hull is drawn: it hides the box
            (*box([0.5] * 3), ORANGE),
            (*box([0.52] * 3, inverted=True), Material(double_sided=True)),
        ],
        [  # a shell with the right orientation hides the box, too
            (*box([0.5] * 3), ORANGE),
            (*box([0.52] * 3), BLACK),
        ],
    ],
)
def test_what_is_no_outline_hull_stays(pieces):
    mesh = mesh_of(*pieces)
    visible, _, codes = keep(mesh)
    assert visible is mesh
    assert codes == {}


@pytest.mark.parametrize("mode", ["BLEND", "MASK"])
def test_a_part_without_alpha_is_left_out(mode):
    ghost = Material(base_color=(1.0, 1.0, 1.0, 0.0), alpha_mode=mode)
    mesh, share, codes = keep(mesh_of((*box([0.5] * 3), ORANGE), (*box([2.5] * 3), ghost)))
    assert volume(mesh) == pytest.approx(1.0)
    assert mesh.vertices.shape == (8, 3)
    assert share == 0
    assert codes == {"transparent_left_out": 12}


def test_the_alpha_of_an_opaque_material_does_not_count():
    solid = Material(base_color=(1.0, 1.0, 1.0, 0.0), alpha_mode="OPAQUE")
    mesh = mesh_of((*box([0.5] * 3), solid))
    assert keep(mesh) == (mesh, 0.0, {})


def test_a_mesh_without_anything_visible_is_rejected():
    ghost = Material(base_color=(1.0, 1.0, 1.0, 0.0), alpha_mode="BLEND")
    with pytest.raises(Reject) as error:
        keep(mesh_of((*box([0.5] * 3), ghost)))
    assert error.value.reason == "fully_transparent"


def test_faces_with_transparent_vertex_colours_are_left_out():
    colors = np.full((8, 4), 255, np.uint8)
    colors[:4, 3] = 0  # the side of negative x
    blend = Material(base_color=(1.0, 1.0, 1.0, 1.0), alpha_mode="BLEND")
    mesh, _, codes = keep(mesh_of((*box([0.5] * 3), blend, {"colors": colors})))
    assert codes == {"transparent_left_out": 2}
    assert len(mesh.faces) == 10
    assert mesh.parts[0].colors.shape == (8, 4)


@pytest.mark.parametrize("mode", ["BLEND", "MASK"])
@pytest.mark.parametrize(
    ("left", "right", "kept"),
    [(0.05, 0.4, 0), (0.05, 0.9, 2), (0.6, 0.9, 2), (0.99, 0.999, 2)],
)
def test_texels_under_a_face_decide(mode, left, right, kept):
    material = Material(
        base_color=(1.0, 1.0, 1.0, 1.0), texture=half_transparent(), alpha_mode=mode
    )
    uv = [[left, 0.2], [right, 0.2], [right, 0.8], [left, 0.8]]
    whole = quad(UNIT, material)
    probe = quad(uv, material)
    shown, _, codes = keep(mesh_of(*[piece_of(m) for m in (whole, probe)]))
    assert len(shown.faces) == 2 + kept
    assert codes == ({} if kept else {"transparent_left_out": 2})


def piece_of(mesh):
    """Return a mesh of one part as an argument of `mesh_of`."""
    return mesh.vertices, mesh.faces, mesh.parts[0].material, {"uv": mesh.parts[0].uv}


def test_a_triangle_beside_the_visible_texels_of_its_box_is_left_out():
    texture = np.zeros((64, 64, 4), np.uint8)
    texture[:20, 44:, 3] = 255  # the corner u = 1, v = 1
    material = Material(texture=texture, alpha_mode="BLEND", base_color=(1.0, 1.0, 1.0, 1.0))
    uv = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    square = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], float)
    mesh, _, codes = keep(mesh_of((square, np.array([[0, 1, 2], [1, 3, 2]]), material, {"uv": uv})))
    assert codes == {"transparent_left_out": 1}
    assert mesh.vertices[mesh.faces].mean(axis=(0, 1))[:2] == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize(("wrap", "kept"), [("repeat", 0), ("mirror", 2), ("clamp", 2)])
def test_the_sampler_decides_which_texels_are_under_a_face(wrap, kept):
    material = Material(
        base_color=(1.0, 1.0, 1.0, 1.0),
        texture=half_transparent(),
        sampler=Sampler(wrap_u=wrap),
        alpha_mode="BLEND",
    )
    probe = quad([[1.1, 0], [1.4, 0], [1.4, 1], [1.1, 1]], material)
    pieces = [piece_of(quad(UNIT, material)), piece_of(probe)]
    assert len(keep(mesh_of(*pieces))[0].faces) == 2 + kept


def test_the_translucent_share_is_one_of_area():
    glass = Material(base_color=(1.0, 1.0, 1.0, 0.3), alpha_mode="BLEND")
    mesh = mesh_of((*box([1, 1, 1]), glass), (*box([2, 2, 2]), ORANGE))
    visible, share, codes = keep(mesh)
    assert visible is mesh
    assert codes == {}
    assert share == pytest.approx(24 / (24 + 96))


def test_a_texture_is_translucent_where_its_texels_are():
    texture = np.full((64, 64, 4), 255, np.uint8)
    texture[:, 48:, 3] = 128
    glass = Material(texture=texture, alpha_mode="BLEND", base_color=(1.0, 1.0, 1.0, 1.0))
    assert keep(quad(UNIT, glass))[1] == pytest.approx(0.25, abs=0.01)


def test_one_drawn_texel_of_many_keeps_its_face():
    """Faces with many texels are sampled for the translucent share, not for what is drawn."""
    texture = np.zeros((600, 600, 4), np.uint8)
    material = Material(alpha_mode="BLEND", texture=texture)
    texture[597, 301, 3] = 255  # under the first triangle, beside the samples
    assert (597 % 3, 301 % 3) != (0, 0)
    mesh, _, codes = keep(quad(UNIT, material))
    assert codes == {"transparent_left_out": 1}
    assert len(mesh.faces) == 1


def test_the_share_of_a_face_with_many_texels_is_that_of_its_samples():
    texture = np.full((700, 700, 4), 255, np.uint8)
    texture[:, :140, 3] = 128  # a fifth
    _, share, _ = keep(quad(UNIT, Material(alpha_mode="BLEND", texture=texture)))
    assert share == pytest.approx(0.2, abs=0.01)


def test_faces_that_show_the_same_texels_are_looked_at_once(monkeypatch):
    """A tree of 2,000 leaves with one image of 1024 x 1024 pixels took 12 CPU-seconds."""
    numbers = []
    exact = visible_parts._texel_opacity

    def counted(alpha, uv, *rest):
        numbers.append(len(uv))
        return exact(alpha, uv, *rest)

    monkeypatch.setattr(visible_parts, "_texel_opacity", counted)
    material = Material(alpha_mode="MASK", texture=half_transparent())
    leaves = 50
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    vertices = np.concatenate([square + np.array([0, 0, k]) for k in range(leaves)])
    faces = np.concatenate([np.array([[0, 1, 2], [0, 2, 3]]) + 4 * k for k in range(leaves)])
    # the last leaf shows the transparent half only
    left = [[0.1, 0.1], [0.4, 0.1], [0.4, 0.9], [0.1, 0.9]]
    uv = np.array([*UNIT * (leaves - 1), *left], np.float32)
    mesh, _, codes = keep(mesh_of((vertices, faces, material, {"uv": uv})))
    assert numbers == [4]
    assert codes == {"transparent_left_out": 2}
    assert mesh.vertices[:, 2].max() == leaves - 2
