"""The peak of a process is its own, whatever the process that started it holds."""

from pipeline.core.memory import peak_memory
from tests.child_python import run_python

_CHILD = """
from pipeline.core.memory import peak_memory
before = peak_memory()
filled = bytearray(b"x") * (200 << 20)
del filled
print(before, peak_memory())
"""
_PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * (400 << 20)
subprocess.run([sys.executable, "-c", {_CHILD!r}], check=True)
"""


def test_the_peak_includes_what_was_freed_and_not_the_memory_of_the_parent():
    before, after = map(int, run_python("-c", _PARENT).stdout.split())
    assert 1 << 20 < before < 150 << 20
    assert 200 << 20 <= after - before + (20 << 20) < 300 << 20


def test_without_proc_the_peak_is_the_one_of_getrusage(monkeypatch, tmp_path):
    own = peak_memory()
    monkeypatch.setattr("pipeline.core.memory.STATUS", tmp_path / "missing")
    assert peak_memory() > 0.9 * own
