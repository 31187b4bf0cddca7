"""Learning rates, and options of the trainer that are out of range."""

import re

import pytest

from train.engine.config import LoopConfig


def test_learning_rates_of_both_schedules():
    constant = LoopConfig(steps=100, learning_rate=1.0, warmup_steps=3)
    assert [constant.rate(step) for step in (0, 1, 3, 99)] == [0.25, 0.5, 1.0, 1.0]
    cosine = LoopConfig(steps=100, learning_rate=1.0, warmup_steps=0, schedule="cosine")
    assert [cosine.rate(step) for step in (0, 50, 100)] == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("learning_rate", 0.0),
        ("ema_decay", 1.0),
        ("max_minutes", 0.0),
        ("spike_factor", 1.0),
        ("keep_last", -1),
        ("betas", (0.9, 1.0)),
        ("seed", 1 << 40),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ValueError, match=re.escape(f", got {value}")) as caught:
        LoopConfig(**{option: value})
    assert str(caught.value).startswith(f"{option} must be ")
