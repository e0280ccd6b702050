"""Markdown tables, against text written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from mavis.utils.markdown import markdown_cell, markdown_table


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (None, {}, "–"),
        (3, {}, "3"),
        (True, {}, "True"),
        (0.123456, {}, "0.1235"),
        (1234567.0, {}, "1.235e+06"),
        (0.5, {}, "0.5"),
        (0.5, {"decimals": 2}, "0.50"),
        (-0.126, {"decimals": 2}, "-0.13"),
        (0.126, {"digits": 2}, "0.13"),
        ("two\n lines", {}, "two lines"),
        ("a | b", {}, "a \\| b"),
    ],
)
def test_a_cell_is_one_line_of_text(value: Any, options: dict[str, int], text: str) -> None:
    assert markdown_cell(value, **options) == text


def test_a_table_has_a_line_for_the_header_the_rule_and_every_row() -> None:
    assert markdown_table(["name", "value"], [["a", 0.25], ["b", None]]) == (
        "| name | value |\n| --- | --- |\n| a | 0.25 |\n| b | – |"
    )


def test_columns_are_aligned_as_asked() -> None:
    assert markdown_table(["a", "b", "c"], [], align="lcr") == "| a | b | c |\n| :-- | :-: | --: |"


def test_decimals_hold_for_every_float_of_a_table() -> None:
    assert markdown_table(["x"], [[1.0], [2], [3.14159]], decimals=1).splitlines()[2:] == [
        "| 1.0 |",
        "| 2 |",
        "| 3.1 |",
    ]
