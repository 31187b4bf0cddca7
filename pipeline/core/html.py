"""Self-contained HTML pages: reports render a jinja2 template that extends `base.html.j2`."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

import jinja2

from pipeline.core.files import write_atomically

# The script of the element <mesh-viewer>, an interactive view of a GLB file or data URI.
MESH_VIEWER = Path(__file__).with_name("mesh_viewer.js")


def render_page(template: Path, **content: Any) -> str:
    """Render a page.

    Values are escaped. A name that the template uses and `content` lacks is an error.

    Args:
        template: A jinja2 file. It may extend "base.html.j2", which has the document's frame and
            the common style.
        **content: The variables of the template.

    Returns:
        The HTML text of the page.

    Raises:
        jinja2.UndefinedError: If a variable of the template is missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**content)


def write_page(path: Path, template: Path, **content: Any) -> Path:
    """Render a page as `render_page` does and write it atomically. Return `path`."""
    write_atomically(path, render_page(template, **content))
    return path


def image_uri(data: bytes, format: str) -> str:
    """Return an encoded image as a data URI, so that the page needs no other file.

    Args:
        data: The bytes of the image file.
        format: Its MIME subtype, such as "png" or "webp".
    """
    return f"data:image/{format};base64,{b64encode(data).decode()}"
