"""Amounts with units: what is taken, what is refused, and that the refusal says what would be right."""

from __future__ import annotations

import pytest

from multum import units
from multum.errors import InputError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.milliseconds, "5ms", 5.0),
        (units.milliseconds, " 0.8 ms ", 0.8),
        (units.milliseconds, "1s", 1000.0),
        (units.milliseconds, "250us", 0.25),
        (units.milliseconds, "250µs", 0.25),
        (units.seconds, "90s", 90.0),
        (units.seconds, "30m", 1800.0),
        (units.seconds, "30min", 1800.0),
        (units.seconds, "1.5h", 5400.0),
        (units.size, "20MB", 20_000_000),
        (units.size, "20 mb", 20_000_000),
        (units.size, "1.5kB", 1500),
        (units.size, "8MiB", 8 * 2**20),
        (units.points, "1", 1.0),
        (units.points, "0.5", 0.5),
        (units.points, "0", 0.0),
        (units.factor, "4", 4.0),
        (units.factor, "4x", 4.0),
    ],
)
def test_amounts_that_are_right(parse, text, value):
    assert parse(text) == pytest.approx(value)


def test_a_drop_in_per_cent_may_have_its_sign():
    assert units.points("10%", per_cent=True) == units.points("10", per_cent=True) == 10.0
    with pytest.raises(InputError, match="zero or more"):
        units.points("-10%", per_cent=True)


@pytest.mark.parametrize(
    ("parse", "text", "hint"),
    [
        (units.milliseconds, "5", "5ms"),
        (units.seconds, "30", "30m"),
        (units.size, "20", "20MB"),
        (units.milliseconds, "5MB", "5ms"),
        (units.size, "20m", "20MB"),
        (units.seconds, "-3m", "above zero"),
        (units.milliseconds, "0ms", "above zero"),
        (units.milliseconds, "fast", "5ms"),
        (units.milliseconds, "", "5ms"),
        (units.seconds, "1,5h", "5m"),
        (units.points, "1%", "write 1"),
        (units.points, "-1", "zero or more"),
        (units.points, "1ms", "write for example 1"),
        (units.factor, "0", "above zero"),
        (units.factor, "4ms", "write for example 4"),
        (units.factor, "1e999", "write for example 4"),
    ],
)
def test_amounts_that_are_wrong_say_what_would_be_right(parse, text, hint):
    with pytest.raises(InputError) as error:
        parse(text, "--limit")
    assert str(error.value).startswith("--limit: ")
    assert repr(text) in str(error.value)
    assert hint in str(error.value)


def test_pairs():
    assert units.pairs("") == {}
    assert units.pairs("text=review, label = stars") == {"text": "review", "label": "stars"}
    assert units.pairs("text=a=b") == {"text": "a=b"}


def test_pairs_lists_every_problem():
    with pytest.raises(InputError) as error:
        units.pairs("text, label=, text_pair=a, text_pair=b", "--columns")
    assert len(error.value.problems) == 3
    assert "given twice" in str(error.value)
