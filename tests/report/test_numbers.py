"""Printed numbers and where they come from."""

import pytest

from blipfit.report.numbers import Number, Record


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number(86.4152, "", 1), "86.4"),
        (Number(3728128, "", 0), "3,728,128"),
        (Number(0.0019, "", 2, factor=100), "0.19"),
        (Number(-0.04, "", 1), "0.0"),
        (Number(50, "").minus(Number(61.25, "", 2)), "−11.2"),
        (Number(61.25, "").minus(Number(50, "")), "+11.2"),
        (Number(600, "", duration=True), "10 min"),
    ],
)
def test_a_number_is_printed_rounded(number, text):
    assert number.text == text


def test_a_number_names_its_place_as_a_json_pointer():
    record = Record("r.json", {"a/b": {"c~d": [1, {"x": 2.5}]}})
    assert record.number("a/b", "c~d", 1, "x").source == "r.json#/a~1b/c~0d/1/x"
    assert Record("r.json", [4], "/history").number(0).source == "r.json#/history/0"


@pytest.mark.parametrize("content", [None, {}, [], {"a": None}, {"a": "4"}, {"a": True}, {"a": float("nan")}])
def test_what_is_no_finite_number_is_none(content):
    record = Record("r.json", content)
    assert record.number("a") is None
    assert record.number("a", "b", 0) is None
    assert record.interval("a") is None
    assert record.mapping("a") == {}


def test_an_interval_needs_both_ends():
    record = Record("r.json", {"whole": [1, 2.25], "open": [1, None]})
    assert [end.text for end in record.interval("whole")] == ["1.0", "2.2"]
    assert record.interval("open") is None
