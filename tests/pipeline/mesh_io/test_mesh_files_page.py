"""The page on mesh files lists every warning code and every ignored element."""

from tests.pipeline.mesh_io.mesh_files_page import PAGE, with_tables


def test_the_tables_are_those_of_the_code():
    command = "python -m tests.pipeline.mesh_io.mesh_files_page"
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, f"docs/mesh_files.md is out of date; run: {command}"
