"""MTL files: options of textures, transparency, emission, names of files, and what is not drawn."""

import re

import numpy as np
import pytest

from pipeline.core.schema import Mesh
from tests.pipeline.mesh_files import png
from tests.pipeline.mesh_io.measures import assert_fuzzed_files_are_safe, read

SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
OBJ = f"mtllib a.mtl\nusemtl m\n{SQUARE}f 1/1 2/2 3/3 4/4\n"
TEXTURE = (10, 20, 30, 255)


def load(folder, statements: str | bytes) -> tuple[Mesh, dict[str, int]]:
    """Load a square with a material of these statements."""
    (folder / "t.png").write_bytes(png(TEXTURE))
    data = statements.encode() if isinstance(statements, str) else statements
    (folder / "a.mtl").write_bytes(b"newmtl m\n" + data)
    return read(folder, "a.obj", OBJ)


def load_material(folder, statements):
    """Return the material, and check that nothing was left out."""
    mesh, codes = load(folder, statements)
    assert codes == {}
    (part,) = mesh.parts
    return part.material


def uv_at(mesh: Mesh, point) -> list[float]:
    (part,) = mesh.parts
    (row,) = np.flatnonzero((mesh.vertices == point).all(axis=1))
    return part.uv[row].tolist()


@pytest.mark.parametrize(
    "statement",
    [
        "map_Kd t.png",
        "MAP_KD T.PNG",
        "\tmap_Kd\t.\\t.png  ",
        'map_Kd "t.png"',
        "map_Kd t.png # the skin",
        "map_Kd /home/me/models/t.png",
        "map_Kd -s 1 1 1 t.png",
        "map_Kd -o 0 0 0 -s 1 1 1 -mm 0 1 t.png",
        "map_Kd -blendu on -blendv off -boost 1.5 -texres 512 -cc off -clamp off t.png",
        "map_Kd -bm 0.5 -imfchan l -type sphere -t 0 0 0 t.png",
        "map_Kd t.png -s 1 1 1",
    ],
)
def test_every_spelling_of_a_texture(tmp_path, statement):
    material = load_material(tmp_path, f"Kd 0.5 0.5 0.5\n{statement}\n")
    assert (material.texture == TEXTURE).all()
    assert material.base_color == (1, 1, 1, 1)
    assert material.alpha_mode == "OPAQUE"


@pytest.mark.parametrize("name", ["my skin.png", "skin#1.png", "a -s 1.png", "gl\xe4nzend.png"])
def test_names_of_textures(tmp_path, name):
    (tmp_path / name).write_bytes(png((9, 9, 9, 255)))
    assert (load_material(tmp_path, f"map_Kd {name}\n").texture[..., 0] == 9).all()
    assert (load_material(tmp_path, f"map_Kd -s 2 2 {name}\n").texture[..., 0] == 9).all()


@pytest.mark.parametrize("encoding", ["gbk", "latin-1"])
def test_names_in_other_encodings(tmp_path, encoding):
    name = {"gbk": "\u7ea2\u8272.png", "latin-1": "gl\xe4nzend.png"}[encoding]
    (tmp_path / name).write_bytes(png((9, 9, 9, 255)))
    material = load_material(tmp_path, f"map_Kd {name}\n".encode(encoding))
    assert (material.texture[..., 0] == 9).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("-s 2 3 1", [2, 3]),
        ("-s 2", [2, 1]),
        ("-o 0.25 0.5 0", [1.25, 1.5]),
        ("-s 2 3 1 -o 0.25 0.5", [2.25, 3.5]),
    ],
)
def test_scale_and_offset_transform_the_texture_coordinates(tmp_path, options, expected):
    mesh, codes = load(tmp_path, f"map_Kd {options} t.png\n")
    assert codes == {}
    assert uv_at(mesh, (1, 1, 0)) == expected


def test_clamp_is_the_wrap_mode(tmp_path):
    sampler = load_material(tmp_path, "map_Kd -clamp on t.png\n").sampler
    assert (sampler.wrap_u, sampler.wrap_v) == ("clamp", "clamp")
    assert load_material(tmp_path, "map_Kd t.png\n").sampler.wrap_u == "repeat"


@pytest.mark.parametrize(
    ("statements", "alpha"),
    [
        ("d 0.25", 0.25),
        ("Tr 0.75", 0.25),
        ("d 0.25\nTr 0.25", 0.25),
        ("Tr 0\nd 1", 1),
        ("Tr 1\nd 1", 1),
        ("d 1", 1),
    ],
)
def test_transparency(tmp_path, statements, alpha):
    material = load_material(tmp_path, f"Kd 1 0 0\n{statements}\n")
    assert material.base_color == (1, 0, 0, alpha)
    assert material.alpha_mode == ("BLEND" if alpha < 1 else "OPAQUE")


def test_a_transparency_of_1_alone_is_the_opacity_of_other_writers(tmp_path):
    mesh, codes = load(tmp_path, "Kd 1 0 0\nTr 1.000000\n")
    assert mesh.parts[0].material.base_color == (1, 0, 0, 1)
    assert codes == {"invalid_value": 1}


def test_an_opacity_map_gives_alpha(tmp_path):
    (tmp_path / "grey.png").write_bytes(png((64, 64, 64, 255)))
    (tmp_path / "leaf.png").write_bytes(png((10, 20, 30, 100)))
    material = load_material(tmp_path, "map_Kd t.png\nmap_d grey.png\n")
    assert material.alpha_mode == "BLEND"
    assert (material.texture == [10, 20, 30, 64]).all()
    # An image with colour and opacity counts once.
    material = load_material(tmp_path, "map_Kd leaf.png\nmap_d leaf.png\n")
    assert (material.texture == [10, 20, 30, 100]).all()
    material = load_material(tmp_path, "map_Kd leaf.png\nmap_d -imfchan m leaf.png\n")
    assert (material.texture == [10, 20, 30, 100]).all()
    material = load_material(tmp_path, "Kd 1 0 0\nmap_d grey.png\n")
    assert material.base_color == (1, 0, 0, 1)
    assert (material.texture == [255, 255, 255, 64]).all()


def test_colours_are_srgb_and_a_single_number_is_a_grey(tmp_path):
    material = load_material(tmp_path, "Kd 0.5 0.5 0.5\nKe 1 0.5 0\n")
    np.testing.assert_allclose(material.base_color, [0.21404] * 3 + [1], atol=1e-4)
    np.testing.assert_allclose(material.emissive, [1, 0.21404, 0], atol=1e-4)
    assert load_material(tmp_path, "Kd 1\n").base_color == (1, 1, 1, 1)
    assert load_material(tmp_path, "Ns 3\n").base_color == (0.8, 0.8, 0.8, 1)


def test_an_emissive_texture_replaces_its_colour(tmp_path):
    material = load_material(tmp_path, "Ke 0 0 0\nmap_Ke t.png\n")
    assert material.emissive == (1, 1, 1)
    assert (material.emissive_texture == TEXTURE).all()


def test_a_missing_or_broken_texture_leaves_the_colour(tmp_path):
    mesh, codes = load(tmp_path, "Kd 1 0 0\nmap_Kd gone.png\n")
    assert mesh.parts[0].material.base_color == (1, 0, 0, 1)
    assert codes == {"side_file_missing": 1}
    (tmp_path / "broken.png").write_bytes(png()[:40])
    mesh, codes = load(tmp_path, "Kd 0.5 0.5 0.5\nmap_Kd broken.png\n")
    np.testing.assert_allclose(mesh.parts[0].material.base_color[:3], [0.21404] * 3, atol=1e-4)
    assert codes == {"image_unreadable": 1}


def test_metallic_and_roughness_of_the_pbr_extension(tmp_path):
    material = load_material(tmp_path, "Pr 0.25\nPm 0.5\n")
    assert (material.roughness, material.metallic) == (0.25, 0.5)
    (tmp_path / "rma.png").write_bytes(png((51, 102, 153, 255)))
    material = load_material(tmp_path, "map_RMA rma.png\n")
    assert (material.roughness, material.metallic) == pytest.approx((0.2, 0.4))
    material = load_material(tmp_path, "map_ORM rma.png\n")
    assert (material.roughness, material.metallic) == pytest.approx((0.4, 0.6))
    (tmp_path / "grey.png").write_bytes(png((51, 51, 51, 255)))
    material = load_material(tmp_path, "map_Pr grey.png\nmap_Pm grey.png\n")
    assert (material.roughness, material.metallic) == pytest.approx((0.2, 0.2))


def test_statements_that_concern_light_and_view_are_ignored(tmp_path):
    statements = (
        "Ka 1 1 1\nKs 1 1 1\nNs 10\nNi 1.5\nillum 2\nPs 1\nPc 1\nPcr 1\naniso 1\nanisor 1\n"
    )
    statements += "map_Ks t.png\nmap_Ns t.png\nmap_Bump -bm 1 t.png\nbump t.png\nnorm t.png\n"
    statements += "Tf 1 1 1\nsharpness 60\nmap_aat on\nmap_Kd t.png\nmap_Ka t.png\n# a comment\n"
    load_material(tmp_path, statements)


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("glow 3", "unknown_element"),
        ("map_Glow t.png", "unknown_element"),
        ("map_Kd -glow 3 t.png", "unknown_attribute"),
        ("map_Kd -mm 0.1 1 t.png", "appearance_ignored"),
        ("map_Kd -t 1 1 1 t.png", "appearance_ignored"),
        ("map_Kd -cc on t.png", "appearance_ignored"),
        ("map_d -imfchan z t.png", "appearance_ignored"),
        ("Kd 1 0 0\nmap_Kd t.png", "appearance_ignored"),
        ("disp t.png", "appearance_ignored"),
        ("decal t.png", "appearance_ignored"),
        ("refl -type sphere t.png", "appearance_ignored"),
        ("map_Ka t.png", "appearance_ignored"),
        ("Tf 1 0.5 1", "appearance_ignored"),
        ("d -halo 0.5", "appearance_ignored"),
        ("Kd red", "invalid_value"),
        ("Kd nan 0 0", "invalid_value"),
        ("Kd spectral a.rfl", "invalid_value"),
        ("newmtl m\nKd 1 1 1", "invalid_value"),
        ("newmtl\nKd 1 1 1\nglow", "unknown_element"),
    ],
)
def test_what_is_not_drawn_gives_a_code(tmp_path, statement, code):
    mesh, codes = load(tmp_path, statement + "\n")
    assert len(mesh.faces) == 2
    assert codes == {code: 1}


def test_a_statement_before_the_first_material_gives_a_code(tmp_path):
    (tmp_path / "a.mtl").write_text("Kd 1 0 0\nnewmtl m\nKd 0 1 0\n", encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", OBJ)
    assert mesh.parts[0].material.base_color == (0, 1, 0, 1)
    assert codes == {"invalid_value": 1}


def test_vertex_colours_are_drawn_without_a_texture_only(tmp_path):
    colored = re.sub(r"(?m)^(v .*)$", r"\1 1 0 0", OBJ)
    (tmp_path / "t.png").write_bytes(png(TEXTURE))
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n", encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", colored)
    assert mesh.parts[0].colors is None
    assert codes == {"appearance_ignored": 1}
    (tmp_path / "a.mtl").write_text("newmtl m\nKd 1 1 1\n", encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", colored)
    assert (mesh.parts[0].colors == [255, 0, 0, 255]).all()
    assert codes == {}


def test_damaged_libraries_never_cost_the_mesh(tmp_path):
    (tmp_path / "t.png").write_bytes(png(TEXTURE))
    library = b"newmtl m\nKd 1 0 0\nmap_Kd -s 1 1 1 t.png\nd 0.5\nKe 0 0 1\nmap_d t.png\n"
    for place in range(len(library)):
        for damage in (b"", b"\xff", b"-o nan ", b"1e999 ", b"\n", b'"', b"#"):
            (tmp_path / "a.mtl").write_bytes(library[:place] + damage + library[place + 1 :])
            mesh, _ = read(tmp_path, "a.obj", OBJ)
            assert len(mesh.faces) == 2
            assert np.isfinite(mesh.parts[0].material.base_color).all()
    assert_fuzzed_files_are_safe(tmp_path, "a.obj", OBJ.encode(), rounds=100)


@pytest.mark.parametrize("name", ["t.png", "skins/t.png", "skins\\T.PNG", "../lib/skins/t.png"])
def test_images_lie_relative_to_the_library_that_names_them(tmp_path, name):
    """They were looked for beside the OBJ file only, which has another image of this name."""
    (tmp_path / "t.png").write_bytes(png((200, 0, 0, 255)))
    place = tmp_path / "lib" / name.replace("\\", "/").lower()
    place.parent.mkdir(parents=True)
    place.write_bytes(png(TEXTURE))
    (tmp_path / "lib" / "a.mtl").write_text(f"newmtl m\nmap_Kd {name}\n", encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", OBJ.replace("a.mtl", "lib/a.mtl"))
    assert codes == {}
    assert (mesh.parts[0].material.texture == TEXTURE).all()


def test_images_of_a_library_elsewhere_may_lie_beside_the_mesh(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "t.png").write_bytes(png(TEXTURE))
    (tmp_path / "lib" / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n", encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", OBJ.replace("a.mtl", "lib/a.mtl"))
    assert codes == {}
    assert (mesh.parts[0].material.texture == TEXTURE).all()


@pytest.mark.parametrize("statement", ["Kd 1 \\\n0 0\n", "Kd \\\r\n 1 \\\n.0 -0\n"])
def test_a_statement_continues_after_a_backslash(tmp_path, statement):
    assert load_material(tmp_path, statement).base_color == (1, 0, 0, 1)


def test_a_path_that_ends_with_a_backslash_costs_itself(tmp_path):
    mesh, codes = load(tmp_path, "map_Kd C:\\textures\\\nKd 1 0 0\n")
    assert mesh.parts[0].material.base_color == (1, 0, 0, 1)
    assert codes.keys() >= {"side_file_missing"}


@pytest.mark.parametrize("material", ["", "newmtl m\nKd 1 1 1\n"])
def test_alpha_of_vertex_colours_is_drawn(tmp_path, material):
    """The surface was opaque."""
    (tmp_path / "a.mtl").write_text(material, encoding="utf-8")
    text = OBJ if material else OBJ.replace("mtllib a.mtl\nusemtl m\n", "")
    mesh, codes = read(tmp_path, "a.obj", re.sub(r"(?m)^(v .*)$", r"\1 1 0 0 0.2", text))
    assert codes == {}
    (part,) = mesh.parts
    assert (part.colors == [255, 0, 0, 51]).all()
    assert part.material.alpha_mode == "BLEND"
    assert part.material.base_color[3] == 1


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("Kd 200 0 0", (1, 0, 0, 1)),
        ("Kd 0 -1 0", (0, 0, 0, 1)),
        ("Kd 0 0 0\nd 5", (0, 0, 0, 1)),
        ("Kd 0 0 0\nTr -1", (0, 0, 0, 1)),
        ("Kd 0 0 0\nd -1", (0, 0, 0, 0)),
    ],
)
def test_numbers_outside_of_their_range_are_reported(tmp_path, statement, expected):
    mesh, codes = load(tmp_path, statement + "\n")
    assert codes == {"invalid_value": 1}
    assert mesh.parts[0].material.base_color == expected
