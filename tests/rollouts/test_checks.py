"""Checks that training and evaluation share: the objectives are the critic's, and there are prompts."""

from __future__ import annotations

from typing import Any

import pytest

from mavis.errors import ConfigError, DataError
from mavis.rollouts.checks import check_objectives, check_prompts


def test_the_critics_objectives_in_its_order_pass(make_tiny_critic: Any, tiny_objectives: Any) -> None:
    check_objectives(make_tiny_critic(), tiny_objectives)


@pytest.mark.parametrize("names", [("brevity", "good"), ("good",), ("good", "brevity", "more"), ("good", "short")])
def test_other_names_or_another_order_are_refused(make_tiny_critic: Any, names: tuple[str, ...]) -> None:
    objectives = {name: lambda prompts, responses: [0.0] * len(responses) for name in names}
    with pytest.raises(ConfigError, match=f"objectives are {', '.join(names)}, but the critic has: good, brevity"):
        check_objectives(make_tiny_critic(), objectives)


@pytest.mark.parametrize("prompts", [[], "The dog", ""])
def test_prompts_are_a_list_of_at_least_one_text(prompts: Any) -> None:
    check_prompts(["The dog"])
    with pytest.raises(DataError, match="expected at least one prompt. Hint: pass a list of texts."):
        check_prompts(prompts)
