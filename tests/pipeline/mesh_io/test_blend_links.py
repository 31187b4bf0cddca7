"""Files that a blend file links are found before Blender opens it."""

import gzip
import random
import struct

import pyarrow
import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.readers.blend_links import check_links
from tests.pipeline.mesh_io.blend_files import HEADERS, STRUCTS, blend_file


def zstandard(content: bytes) -> bytes:
    """Compress as Blender does: several frames, then a frame that readers skip."""
    half = len(content) // 2
    frames = [
        pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:])
    ]
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, 9) + bytes(9)


PACKERS = {"plain": bytes, "gzip": gzip.compress, "zstandard": zstandard}


@pytest.fixture
def root(tmp_path):
    """A root with the directory of the blend file, and a blend file beside the root."""
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "outside.blend").write_bytes(blend_file())
    return tmp_path / "root"


def verdict(root, content: bytes, max_unpacked_bytes: int = 1 << 30) -> str:
    """Return the error of a blend file in root/a, "" if it may be opened."""
    try:
        cfg = LoadConfig(max_unpacked_bytes=max_unpacked_bytes)
        check_links(content, root / "a/a.blend", root, cfg)
    except Reject as error:
        return error.numbers.get("error", error.reason)
    return ""


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("layout", HEADERS)
@pytest.mark.parametrize("kind", ["Library", "CacheFile"])
def test_a_link_to_a_file_outside_is_rejected_in_every_layout(root, layout, packer, kind):
    links = [("Image", "//../../outside.blend"), (kind, "//../../outside.blend")]
    content = PACKERS[packer](blend_file(links, layout))
    with pytest.raises(Reject) as caught:
        check_links(content, root / "a/a.blend", root, LoadConfig())
    assert caught.value.reason == "unreadable"
    numbers = {"error": "file_outside_root", "kind": kind, "name": "//../../outside.blend"}
    assert caught.value.numbers == numbers
    assert verdict(root, PACKERS[packer](blend_file(links[:1], layout))) == ""  # images may


@pytest.mark.parametrize(
    "spelling", ["//..\\..\\outside.blend", "{}", "C:{}", "//../gone/../../outside.blend"]
)
def test_all_spellings_of_a_path_are_understood(root, spelling):
    name = spelling.format(root.with_name("outside.blend"))
    assert verdict(root, blend_file([("Library", name)])) == "file_outside_root"


def test_a_link_through_a_symbolic_link_is_rejected(root):
    (root / "inside.blend").symlink_to(root.with_name("outside.blend"))
    assert verdict(root, blend_file([("Library", "//../inside.blend")])) == "file_outside_root"


@pytest.mark.parametrize(
    "name", ["//../../gone.blend", "/gone/x.blend", "//" + "x" * 900, "//a\udcff"]
)
def test_links_to_files_that_do_not_exist_are_left_to_blender(root, name):
    content = blend_file([("Library", name.encode("utf-8", "surrogateescape").decode("latin-1"))])
    assert verdict(root, content) == ""


def test_libraries_of_libraries_are_checked_and_cycles_end(root):
    (root / "b.blend").write_bytes(gzip.compress(blend_file([("Library", "//a/c.blend")])))
    cycle = [("Library", "//../b.blend"), ("Library", "//c.blend"), ("Library", "//a.blend")]
    (root / "a/c.blend").write_bytes(blend_file(cycle))
    assert verdict(root, blend_file([("Library", "//../b.blend")])) == ""
    outside = [*cycle, ("CacheFile", "//../../outside.blend")]
    (root / "a/c.blend").write_bytes(blend_file(outside))
    assert verdict(root, blend_file([("Library", "//../b.blend")])) == "file_outside_root"


@pytest.mark.parametrize("packer", ["gzip", "zstandard"])
def test_a_bomb_is_rejected(root, packer):
    bomb = PACKERS[packer](blend_file() + bytes(1 << 22))
    assert verdict(root, bomb, max_unpacked_bytes=1 << 21) == "allocation_bomb"
    assert verdict(root, bomb, max_unpacked_bytes=1 << 23) == ""
    # The limit is that of all files together.
    (root / "a/b.blend").write_bytes(bomb)
    linking = PACKERS[packer](blend_file([("Library", "//b.blend")]) + bytes(1 << 22))
    assert verdict(root, linking, max_unpacked_bytes=6 << 20) == "allocation_bomb"


@pytest.mark.parametrize(
    "content",
    [
        b"BLENDER-v405RENDH",
        b"BLENDER99-02v0500" + bytes(100),
        b"BLENDER-v405" + struct.pack("<4siQii", b"LI", -99, 0, 0, 1) + bytes(99),
        blend_file().replace(b"TYPE", b"type"),
        blend_file().replace(
            b"SDNANAME" + struct.pack("<i", 10), b"SDNANAME" + bytes([255] * 3 + [63])
        ),
        b"\x1f\x8b" + bytes(100),
        b"\x28\xb5\x2f\xfd" + bytes(100),
        gzip.compress(blend_file())[:200],
    ],
)
def test_a_damaged_structure_is_rejected(root, content):
    assert verdict(root, content) == "blend_structure"


def test_a_struct_whose_size_is_not_that_of_its_members_is_rejected(root):
    """The search for names steps by the size, so a size of 0 must not be used."""
    content = blend_file([("Library", "//b.blend")])
    (size,) = struct.unpack_from("<H", content, content.index(b"TLEN") + 4 + 2 * 5)
    sizes = struct.pack("<6H", 0, 1, 2, 4, 80, size)
    assert content.count(sizes) == 1
    assert verdict(root, content) == ""
    smaller = struct.pack("<6H", 0, 1, 2, 4, 80, 0)
    assert verdict(root, content.replace(sizes, smaller)) == "blend_structure"


@pytest.mark.parametrize("layout", HEADERS)
def test_damaged_files_end_as_rejections(root, layout):
    generator = random.Random(0)
    content = blend_file([(kind, "//b.blend") for kind in STRUCTS if kind != "ID"], layout)
    start = content.index(b"DNA1") - 300  # names are long and empty
    seen = set()
    for _ in range(300):
        data = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            place = generator.choice(
                (generator.randrange(40), generator.randrange(start, len(data)))
            )
            data[place : place + 4] = generator.randbytes(generator.choice((0, 1, 4, 9)))
        seen.add(verdict(root, bytes(data)))
    assert seen == {"", "blend_structure"}
