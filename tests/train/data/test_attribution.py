"""Attribution on its way from builds through runs to an export."""

import pytest

from train.data.attribution import ATTRIBUTION, attributed, export_attribution

HEADER = "uid,author,title,licence,url\n"


def run_on(folder, name, *lines):
    """A run that ended, on a build with these assets."""
    data, out = folder / f"{name}-data", folder / name
    data.mkdir()
    (data / ATTRIBUTION).write_text(HEADER + "".join(lines), encoding="utf-8")
    with attributed(data, out, is_first=True):
        (out / "flow" / "latest").mkdir(parents=True)
    return out


def test_an_export_names_the_authors_of_all_runs_once(tmp_path):
    one = run_on(tmp_path, "one", 'a,Ann,"A, b",by,x\n', "b,Bob,B,cc0,y\n")
    two = run_on(tmp_path, "two", "b,Bob,B,cc0,y\n", "c,Cy,C,by,z\n")
    out = tmp_path / "export"
    out.mkdir()
    assert export_attribution([one / "flow" / "latest", two / "flow"], out) == 3
    text = (out / ATTRIBUTION).read_text(encoding="utf-8")
    assert text == HEADER + 'a,Ann,"A, b",by,x\n' + "b,Bob,B,cc0,y\n" + "c,Cy,C,by,z\n"


def stopped(data, out, *, begins):
    """A run that is interrupted before or after it made its directory."""
    with attributed(data, out, is_first=True):
        if begins:
            out.mkdir()
        raise KeyboardInterrupt


def test_a_stopped_run_has_its_attribution_and_one_that_never_began_none(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / ATTRIBUTION).write_text(HEADER, encoding="utf-8")
    for name, begins in (("stopped", True), ("never", False)):
        with pytest.raises(KeyboardInterrupt):
            stopped(data, tmp_path / name, begins=begins)
    assert (tmp_path / "stopped" / ATTRIBUTION).exists()
    assert not (tmp_path / "never").exists()


def test_without_attribution_nothing_is_written(tmp_path):
    with attributed(tmp_path / "old", tmp_path, is_first=True):
        pass
    assert export_attribution([tmp_path / "latest"], tmp_path / "export") == 0
    assert list(tmp_path.iterdir()) == []
