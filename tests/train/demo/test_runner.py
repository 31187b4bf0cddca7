"""The order in which the demo's commands run, their cost, and what happens when one fails."""

import time

import pytest

from pipeline.core.errors import RunError
from train.demo.plan import Command, DemoPlan
from train.demo.runner import run_demo


def timeit(name, statement):
    return Command(name=name, arguments=("timeit", "-n", "1", "-r", "1", statement))


def sleep(name, seconds):
    return timeit(name, f"import time; time.sleep({seconds})")


def test_sequences_of_a_group_run_at_the_same_time_and_groups_one_after_another(tmp_path):
    first = (sleep("a", 0.6), sleep("b", 0.1))
    second = (sleep("c", 0.7),)
    last = timeit("the end", "1")
    started = time.monotonic()
    costs = run_demo(DemoPlan(groups=((first, second), ((last,),)), out=tmp_path))
    assert [cost.name for cost in costs] == ["a", "b", "c", "the end"]
    assert time.monotonic() - started < sum(cost.seconds for cost in costs) - 0.4
    assert costs[0].command_line.startswith("python -m timeit")
    assert costs[0].seconds >= 0.6 > costs[3].seconds - 5
    assert costs[0].peak_bytes > 1e6
    assert (tmp_path / "logs" / "the-end.log").read_text(encoding="utf-8").startswith("1 loop")


def test_a_failed_command_terminates_the_others_and_its_log_is_quoted(tmp_path):
    group = (
        (sleep("long", 60), sleep("never", 60)),
        (Command(name="bad", arguments=("json.tool", "no-such-file")),),
    )
    started = time.monotonic()
    with pytest.raises(RunError, match=r"bad ended with exit code [12] (.|\n)*no-such-file"):
        run_demo(DemoPlan(groups=(group,), out=tmp_path))
    assert time.monotonic() - started < 30
    assert not (tmp_path / "logs" / "never.log").exists()
