"""Attribution on its way from builds through runs to an export."""

import pytest

from train.data.attribution import (
    ATTRIBUTION,
    attribute_weights,
    attributed,
    export_attribution,
)

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
    (data / ATTRIBUTION).write_text(HEADER + "a,Ann,A,by,x\n", encoding="utf-8")
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


def test_the_attribution_of_initial_weights_reaches_the_tuned_export(tmp_path):
    first = tmp_path / "first"
    for stage in ("dit_64", "vae_64"):
        (first / stage).mkdir(parents=True)
    (first / ATTRIBUTION).write_text(HEADER + "a,Ann,A,by,x\n", encoding="utf-8")
    attribute_weights(first / "dit_64", tmp_path / "tuned")
    # The run is resumed on a build that has another column and a newer row of one asset.
    run_on(tmp_path, "tuned", "b,Bob,B,cc0,y\n")
    data = tmp_path / "tuned-data"
    (data / ATTRIBUTION).write_text("uid,author,page\nb,Bea,p\n", encoding="utf-8")
    with attributed(data, tmp_path / "tuned", is_first=True):
        pass
    header = "uid,author,title,licence,url,page\n"
    rows = (tmp_path / "tuned" / ATTRIBUTION).read_text(encoding="utf-8")
    assert rows == header + "a,Ann,A,by,x,\n" + "b,Bea,,,,p\n"
    assert export_attribution([tmp_path / "tuned" / "flow" / "latest"], tmp_path / "new") == 2
    assert (tmp_path / "new" / ATTRIBUTION).read_text(encoding="utf-8") == rows


def test_an_export_keeps_the_rows_of_stages_that_stay(tmp_path):
    run = run_on(tmp_path, "run", "b,Bob,B,cc0,y\n")
    out = run_on(tmp_path, "export", "a,Ann,A,by,x\n")
    assert export_attribution([run / "flow"], out, keep=True) == 2
    assert export_attribution([run / "flow"], out) == 1


def test_weights_without_attribution_make_no_directory(tmp_path):
    attribute_weights(tmp_path / "weights", tmp_path / "run")
    assert not (tmp_path / "run").exists()
