"""The tables of docs/mesh_files.md.

`python -m tests.pipeline.mesh_io.mesh_files_page` writes them into the page.
"""

import re
from pathlib import Path

from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load_warnings import WARNING_CODES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mesh_files.md"


def tables() -> dict[str, str]:
    """Return {name of a pair of markers in the page: the Markdown between them}."""
    codes = ["| code | meaning |", "|---|---|"]
    codes += [f"| `{code}` | {meaning} |" for code, meaning in WARNING_CODES.items()]
    ignored = ["| format | element, attribute or extension | reason |", "|---|---|---|"]
    ignored += [
        f"| {format_name} | `{element}` | {reason} |"
        for format_name, elements in IGNORED_ELEMENTS.items()
        for element, reason in elements.items()
    ]
    return {"warning-codes": "\n".join(codes), "ignored-elements": "\n".join(ignored)}


def with_tables(text: str) -> str:
    """Return the text of the page with the present tables between its markers."""
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"docs/mesh_files.md has no markers {name}"
        text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
