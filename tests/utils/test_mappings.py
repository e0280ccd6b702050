"""Nested mappings by path."""

from __future__ import annotations

from mavis.utils.mappings import flatten


def test_values_are_named_by_their_path() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": "x"}, "e": None}}) == {"a": 1, "b.c.d": "x", "b.e": None}


def test_an_empty_mapping_is_a_value_and_lists_stay_whole() -> None:
    assert flatten({"a": {}, "b": [{"c": 1}]}) == {"a": {}, "b": [{"c": 1}]}
