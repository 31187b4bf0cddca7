"""Bounds of options that are declared beside them."""

from dataclasses import dataclass

import pytest

from pipeline.core.options import at_least, between, check_bounds


@dataclass(frozen=True)
class Options:
    workers: int = at_least(0, 4)
    limit: int | None = at_least(1, None)
    share: float = between(0.0, 1.0, 0.5)

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class More(Options):
    workers: int = 8  # declared again with another default
    share: float = at_least(2, 2.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Options(workers=-1), "workers must be 0 or more, got -1"),
        (lambda: Options(limit=0), "limit must be 1 or more, got 0"),
        (lambda: Options(share=1.5), "share must be from 0.0 to 1.0, got 1.5"),
        (lambda: More(workers=-1), "workers must be 0 or more, got -1"),
        (lambda: More(share=1.0), "share must be 2 or more, got 1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_values_in_range_are_accepted():
    assert Options(workers=0, limit=None, share=1.0).workers == 0
    assert (More().workers, More().share) == (8, 2.0)
