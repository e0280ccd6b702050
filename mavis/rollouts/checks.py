"""Checks of arguments that training and evaluation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mavis.critics import Critic
from mavis.errors import ConfigError, DataError
from mavis.policies import Prompt
from mavis.rewards import Objective
from mavis.rewards.protocol import check_callable


def check_objectives(critic: Critic, objectives: Mapping[str, Objective]) -> None:
    """Check that objectives can be called and are a critic's, in its order: values are paired by position.

    Args:
        critic: that is trained or evaluated.
        objectives: by name.

    Raises:
        ConfigError: if the names or their order differ.
        ObjectiveError: if one cannot be called with prompts and responses.
    """
    if tuple(objectives) != critic.objectives:
        raise ConfigError(
            f"objectives are {', '.join(objectives)}, but the critic has: {', '.join(critic.objectives)}.",
            "pass the same names in the same order.",
        )
    for name, objective in objectives.items():
        check_callable(name, objective)


def check_prompts(prompts: Sequence[Prompt], hint: str = "pass a list of texts.") -> None:
    """Check that prompts are a sequence of at least one text, not a single text.

    Args:
        prompts: to sample from.
        hint: of the error.

    Raises:
        DataError: if they are not.
    """
    if isinstance(prompts, str) or not prompts:
        raise DataError(f"prompts is {prompts!r}, expected at least one prompt.", hint)
