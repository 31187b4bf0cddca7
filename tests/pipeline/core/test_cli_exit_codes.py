"""Exit codes of commands, and errors that end in one line."""

import errno
import re
import signal
from pathlib import Path

import pytest

from pipeline.core.cli import command
from pipeline.core.errors import RunError


def fail(_):
    raise RunError("the disk is full")


def interrupt(_):
    signal.raise_signal(signal.SIGINT)


def terminate(_):
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("action", "code"), [(fail, 1), (interrupt, 130), (terminate, 143), (lambda _: None, 0)]
)
def test_exit_codes(action, code):
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(signum) for signum in signals]
    try:
        with pytest.raises(SystemExit) as end:
            command(action)
    finally:
        for signum, handler in zip(signals, handlers):
            signal.signal(signum, handler)
    assert end.value.code == code


def write_below_a_file(_):
    Path(__file__, "page.html").write_text("", encoding="utf-8")


def write_to_a_directory(_):
    Path(__file__).parent.write_text("", encoding="utf-8")


def write_to_a_read_only_file_system(_):
    raise PermissionError(errno.EROFS, "Read-only file system", "report/.index.html.partial")


@pytest.mark.parametrize(
    "action", [write_below_a_file, write_to_a_directory, write_to_a_read_only_file_system]
)
def test_a_path_that_cannot_be_written_is_reported_in_one_line(action, caplog):
    with pytest.raises(SystemExit) as end:
        command(action)
    assert end.value.code == 1
    (record,) = caplog.records
    assert re.fullmatch(
        r"\S+: [A-Z][-a-z ]+; choose another place or allow writing there", record.getMessage()
    )


def read_a_missing_file(_):
    Path("/no/such/file").read_text(encoding="utf-8")


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        command(read_a_missing_file)
