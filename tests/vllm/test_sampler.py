"""The vLLM sampler names what is missing or mistaken, also where vLLM is not installed."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

import mavis.vllm.sampler
from mavis.cli.build import build_sampler
from mavis.errors import ConfigError, MissingPackageError
from mavis.rollouts import RolloutSettings
from mavis.vllm.sampler import VllmSampler


def sampler(kind: str, **options: Any) -> Any:
    return build_sampler(OmegaConf.create({"sampler": {"kind": kind, "options": options}}))


def test_sampling_with_vllm_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mavis.vllm.sampler, "find_spec", lambda name: None)
    for make in (VllmSampler, lambda: sampler("vllm")):
        with pytest.raises(MissingPackageError, match=r"needs vLLM.*Hint: pip install vllm.*or use the sampler `gen"):
            make()


def test_an_unknown_sampler_suggests_a_similar_name() -> None:
    with pytest.raises(ConfigError, match="sampler.kind is 'vlm'.*did you mean 'vllm'"):
        sampler("vlm")


def test_a_shortest_length_is_refused_before_an_engine_starts() -> None:
    sampler = VllmSampler.__new__(VllmSampler)
    with pytest.raises(ConfigError, match="min_new_tokens is 2, which the sampler 'vllm' does not support. Hint: use"):
        sampler.draw(None, None, ["the dog"], RolloutSettings(min_new_tokens=2), 0)


def test_an_option_that_the_sampler_sets_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="model is 'other', but the sampler sets it"):
        sampler("vllm", model="other")
