"""The examples in the docstrings of the modules that import without vLLM run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["batch", "request_arguments", "sampler"])
def test_examples_run(name: str) -> None:
    results = doctest.testmod(
        importlib.import_module(f"mavis.vllm.{name}"), optionflags=doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert results.attempted > 0
    assert results.failed == 0
