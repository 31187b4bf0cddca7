"""Names of checkpoints: directories and the weights that the package ships."""

import pytest

from model.inference import checkpoint_source
from model.inference.checkpoint_source import find_checkpoint, is_shipped
from pipeline.core.errors import UserError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the directory of the shipped weights of an installation, which is empty."""
    monkeypatch.setattr(checkpoint_source, "SHIPPED_WEIGHTS", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "package"


def test_a_name_of_shipped_weights_is_their_directory_in_the_package(package):
    stage = package / "props" / "structure"
    stage.mkdir(parents=True)
    (stage / "config.json").touch()
    assert is_shipped("props")
    assert find_checkpoint("props") == package / "props"


def test_weights_that_are_not_installed_are_one_line(package):
    (package / "props").mkdir(parents=True)
    for exists in (True, False):
        with pytest.raises(UserError, match=r"props are not in this installation \(.*/props"):
            find_checkpoint("props")
        if exists:
            (package / "props").rmdir()


def test_a_directory_of_that_name_goes_first(package, tmp_path):
    (tmp_path / "work" / "props").mkdir()
    assert not is_shipped("props")
    assert str(find_checkpoint("props")) == "props"
    with pytest.raises(UserError, match=r"toys is not a directory; .* or shipped weights: props"):
        find_checkpoint("toys")
