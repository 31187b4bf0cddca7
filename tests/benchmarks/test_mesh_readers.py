"""The comparison of mesh readers: what counts as agreement, and the table."""

from pathlib import Path

from benchmarks.mesh_readers import compare, is_confirmed, table

UNREADABLE = {"error": "no triangles"}


def read(size: float = 1.0, area: float = 6.0, triangles: int = 12) -> dict:
    """Return the measures of a box with a corner at the origin."""
    return {
        "low": [0.0] * 3,
        "high": [size] * 3,
        "area": area,
        "triangles": triangles,
        "textures": None,
        "warnings": [],
    }


def test_files_that_no_reader_reads_are_unreadable_and_no_disagreement():
    path = Path("a.abc")
    pairs = [
        (read(), read(size=100, area=60_000)),  # another unit is no difference
        (read(), read(area=7)),
        (read(), read(triangles=13)),
        (read(), UNREADABLE),
        (UNREADABLE, read()),
        (UNREADABLE, UNREADABLE),
    ]
    rows = [compare(path, {"ours": ours, "blender": peer}) for ours, peer in pairs]
    found = [row["disagrees_with"].get("blender", []) for row in rows]
    assert found == [[], ["area"], ["triangles"], [], ["rejected"], []]
    assert [is_confirmed(row) for row in rows] == [True, False, True, False, False, True]
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in table(rows, ["blender"]).splitlines()
    ]
    counts = dict(zip(lines[0], lines[2], strict=True))
    assert counts == {
        "format": "abc",
        "files": "6",
        "read": "4",
        "unreadable": "1",
        "with warnings": "0",
        "confirmed": "3",
        "by no reader": "1",
        "blender reads": "4",
        "same box and area": "2",
        "same triangles": "2",
    }
