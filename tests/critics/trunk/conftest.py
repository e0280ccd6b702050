"""Fixtures of the tests of a value model's trunk."""

from __future__ import annotations

import pytest

from mavis.critics.trunk.reader import PrefixReader
from tests.critics.trunk.reading import fresh_reader


@pytest.fixture
def reader() -> PrefixReader:
    """A reader with a Llama, which has read nothing yet."""
    return fresh_reader("Llama")
