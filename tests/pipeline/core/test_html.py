"""HTML pages: escaping, missing variables, the common frame, and atomic replacement."""

import jinja2
import pytest

from pipeline.core.html import image_uri, render_page, write_page


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "page.html.j2"
    path.write_text(
        '{% extends "base.html.j2" %}\n{% block title %}{{ title }}{% endblock %}\n'
        "{% block main %}<p>{{ text }}</p>{% endblock %}\n",
        encoding="utf-8",
    )
    return path


def test_a_page_has_the_frame_of_the_base_template_and_escapes_values(template):
    html = render_page(template, title="a & b", text="<script>", encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "<title>a &amp; b</title>" in html
    assert "<main>\n<p>&lt;script&gt;</p>" in html
    assert html.rstrip().endswith("</main></body></html>")


def test_a_missing_variable_is_an_error_and_leaves_the_old_page(template, tmp_path):
    page = tmp_path / "report" / "index.html"
    assert write_page(page, template, title="first", text="") == page
    before = page.read_bytes()
    with pytest.raises(jinja2.UndefinedError, match="text"):
        write_page(page, template, title="second")
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_an_image_becomes_a_data_uri():
    assert image_uri(b"abc", "webp") == "data:image/webp;base64,YWJj"
