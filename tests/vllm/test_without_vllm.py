"""What asks for vLLM says so where there is none, and so does a sampler that nobody knows."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

import mavis.vllm.sampler
from mavis.cli.build import build_sampler
from mavis.errors import ConfigError, MissingPackageError
from mavis.vllm.sampler import VllmSampler


def sampler(kind: str, **options: Any) -> Any:
    return build_sampler(OmegaConf.create({"sampler": {"kind": kind, "options": options}}))


def test_sampling_with_vllm_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mavis.vllm.sampler, "find_spec", lambda name: None)
    for make in (VllmSampler, lambda: sampler("vllm")):
        with pytest.raises(MissingPackageError, match=r"needs vLLM.*Hint: pip install vllm.*or use the sampler `gen"):
            make()


def test_an_unknown_sampler_is_told_the_one_that_was_probably_meant() -> None:
    with pytest.raises(ConfigError, match="sampler.kind is 'vlm'.*did you mean 'vllm'"):
        sampler("vlm")


def test_what_the_sampler_sets_is_no_option() -> None:
    with pytest.raises(ConfigError, match="model is 'other', but the sampler sets it"):
        sampler("vllm", model="other")
