"""The page of an evaluation: its table, its pictures and its protocol."""

from train.evaluation.page import write_page


def test_the_page_shows_table_pictures_and_protocol(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    table = "| asset | IoU |\n|---|---:|\n| <a> | 0.5 |"
    protocol = {"samples": 20, "sampling": {"steps": 4, "seed": None}, "unknown_number": None}
    page = write_page(tmp_path, "An evaluation", protocol, table, {"a.png": "one asset"})
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "index.html"
    assert "<h1>An evaluation</h1>" in text
    assert "<td>&lt;a&gt;</td><td>0.5</td>" in text
    assert 'alt="one asset" src="data:image/png;base64,YWJj"' in text
    assert "<dt>sampling</dt><dd>steps 4</dd>" in text
    assert "unknown" not in text
