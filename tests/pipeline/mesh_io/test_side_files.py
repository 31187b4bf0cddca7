"""Side files are found under the names that real files use, and never outside the root."""

import pytest

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.side_files import SideFiles


@pytest.fixture
def source(tmp_path):
    """A source with one asset in root/models/car, and a secret beside the root."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    for name in (
        "models/car/a.obj",
        "models/car/tex/Red Paint.PNG",
        "models/car/b.png",
        "models/textures/wood.png",
        "materials/textures/stone.png",
        "b.png",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("b.png", "models/car/b.png"),  # the nearest of two
        ("tex/Red Paint.PNG", "models/car/tex/Red Paint.PNG"),
        ("tex/Red%20Paint.PNG", "models/car/tex/Red Paint.PNG"),
        ("TEX\\red paint.png", "models/car/tex/Red Paint.PNG"),
        ("./tex//Red Paint.PNG", "models/car/tex/Red Paint.PNG"),
        ("../textures/wood.png", "models/textures/wood.png"),
        ("..\\Textures\\Wood.PNG", "models/textures/wood.png"),
        ("../../materials/textures/stone.png", "materials/textures/stone.png"),
        ("C:\\Users\\me\\work\\textures\\wood.png", "models/textures/wood.png"),
        ("/home/me/materials/textures/stone.png", "materials/textures/stone.png"),
        ("file:///C:/x/tex/Red%20Paint.PNG", "models/car/tex/Red Paint.PNG"),
        ("lost/b.png", "models/car/b.png"),
        ("wood.png", "models/textures/wood.png"),
        ("lost/Stone.png", "materials/textures/stone.png"),
    ],
)
def test_names_of_real_files(source, name, expected):
    warnings = WarningLog()
    side_files = SideFiles(source / "models/car/a.obj", source, warnings)
    assert side_files.read(name) == expected.encode()
    assert warnings.items() == ()


@pytest.mark.parametrize(
    "name",
    [
        "../../../secret.png",
        "/etc/passwd",
        "link.png",
        "loop.png",
        "folder",
        "a\0b",
        "x" * 5000,
        "x" * 300,
        "",
        "  ",
        "..",
        "gone.png",
    ],
)
def test_nothing_outside_the_root_is_read(source, name):
    folder = source / "models/car"
    (folder / "link.png").symlink_to(source.parent / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder").mkdir()
    warnings = WarningLog()
    side_files = SideFiles(folder / "a.obj", source, warnings)
    assert side_files.read(name) is None
    assert side_files.read(name) is None
    (warning,) = warnings.items()
    assert (warning.code, warning.count) == ("side_file_missing", 1)


def test_without_a_root_only_the_folder_of_the_asset_counts(source):
    side_files = SideFiles(source / "models/car/a.obj", None, WarningLog())
    assert side_files.read("../textures/wood.png") is None
    assert side_files.read("b.png") == b"models/car/b.png"


@pytest.mark.parametrize(
    ("stored", "named"),
    [("cafe\u0301.png", "caf\u00e9.png"), ("caf\u00e9.png", "CAFE\u0301.PNG")],
)
def test_composed_and_decomposed_characters_are_equal(tmp_path, stored, named):
    """macOS stores names decomposed, and other programs write them composed."""
    (tmp_path / stored).write_bytes(b"pixels")
    warnings = WarningLog()
    assert SideFiles(tmp_path / "a.obj", None, warnings).read(named) == b"pixels"
    assert warnings.items() == ()
