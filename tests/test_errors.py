"""Errors: what a user reads, wherever they were raised."""

from __future__ import annotations

import pickle

import pytest

from mavis import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MavisError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_comes_back_whole_from_another_process(kind: type[errors.MavisError]) -> None:
    back = pickle.loads(pickle.dumps(kind("beta is -1, expected ≥ 0.", "0 is the plain policy.")))
    assert type(back) is kind
    assert str(back) == "beta is -1, expected ≥ 0. Hint: 0 is the plain policy."
    assert (back.message, back.hint) == ("beta is -1, expected ≥ 0.", "0 is the plain policy.")
