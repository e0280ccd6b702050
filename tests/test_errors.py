"""Errors: what a user reads, wherever they were raised."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mavis import errors
from mavis.errors import ConfigError, DecodingError, check_number, check_whole, import_optional

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MavisError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_whole_from_another_process(kind: type[errors.MavisError]) -> None:
    back = pickle.loads(pickle.dumps(kind("beta is -1, expected ≥ 0.", "0 is the plain policy.")))
    assert type(back) is kind
    assert str(back) == "beta is -1, expected ≥ 0. Hint: 0 is the plain policy."
    assert (back.message, back.hint) == ("beta is -1, expected ≥ 0.", "0 is the plain policy.")


@pytest.mark.parametrize("value", [1, 7, 10**30])
def test_whole_numbers_pass(value: int) -> None:
    check_whole(ConfigError, "e.g. 1.", rows=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None, math.nan])
def test_what_is_no_whole_number_or_too_small_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        check_whole(ConfigError, "e.g. 1.", fine=1, rows=value)
    assert str(raised.value) == f"rows is {value!r}, expected a whole number ≥ 1. Hint: e.g. 1."


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.25), np.float64(0.25), Fraction(1, 3), 1e300])
def test_finite_numbers_pass(value: Any) -> None:
    check_number(DecodingError, "e.g. 0.5.", scale=value)
    check_number(DecodingError, "e.g. 0.5.", low=0, strict=True, scale=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5", None, 1j, np.array([1.0])])
def test_what_is_no_finite_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(DecodingError) as raised:
        check_number(DecodingError, "e.g. 0.5.", fine=1.0, scale=value)
    assert str(raised.value) == f"scale is {value!r}, expected a finite number. Hint: e.g. 0.5."


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "expected"),
    [
        ({"low": 0}, [0, 0.0, 3], [-1e-9], "≥ 0"),
        ({"low": 0, "strict": True}, [1e-9, 3], [0, 0.0, -1], "> 0"),
        ({"high": 1}, [1, -5], [1.1], "≤ 1"),
        ({"low": 0.5, "high": 1}, [0.5, 0.7, 1.0], [0.4, 1.1], "≥ 0.5 and ≤ 1"),
        ({"low": 0, "high": 1, "strict": True}, [0.1, 1], [0, 2], "> 0 and ≤ 1"),
    ],
)
def test_bounds_are_included_unless_the_lower_one_is_strict(
    bounds: dict[str, Any], inside: list[float], outside: list[float], expected: str
) -> None:
    for value in inside:
        check_number(ConfigError, "e.g. 1.", **bounds, rate=value)
    for value in outside:
        with pytest.raises(ConfigError) as raised:
            check_number(ConfigError, "e.g. 1.", **bounds, rate=value)
        assert str(raised.value) == f"rate is {value!r}, expected a finite number {expected}. Hint: e.g. 1."


def test_an_optional_module_is_imported_or_its_extra_named() -> None:
    assert import_optional("json.decoder", "reading", "lora").__name__ == "json.decoder"
    with pytest.raises(errors.MissingPackageError) as raised:
        import_optional("no_such_package.inside", "lora_rank=3", "lora", ", or set lora_rank=0")
    assert str(raised.value) == (
        "lora_rank=3 needs no_such_package, which is not installed. "
        "Hint: pip install 'mavis-decoding[lora]', or set lora_rank=0."
    )


def test_a_library_is_quoted_by_its_first_sentence() -> None:
    assert errors.first_sentence(ValueError("It is\n  bad. Set x=1.")) == "It is bad"
    assert errors.first_sentence(ValueError()) == "ValueError"


def test_a_near_name_is_suggested_and_else_all_are_listed() -> None:
    assert errors.closest("helpfull", ["helpful", "harmless"]) == "did you mean 'helpful'?"
    assert errors.closest("zzz", ["helpful", "harmless"]) == "known: helpful, harmless."
    assert errors.closest("zzz", []) == "known: none."
