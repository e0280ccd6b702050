"""Finds the critic of a serving engine, checks that it fits the served model, and loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mavis.critics import Critic, HiddenStateCritic, ValueModelCritic
from mavis.errors import CriticError, MavisError, warn_user
from mavis.vectors.model_tensors import tensors_of

ENVIRONMENT_VARIABLE, CONFIG_KEY = "MAVIS_CRITIC", "mavis_critic"


def critic_folder(additional_config: object) -> str:
    """Return the critic folder that an engine is configured with.

    Args:
        additional_config: the engine's; its entry `mavis_critic` takes precedence over the environment variable
            `MAVIS_CRITIC`.

    Raises:
        CriticError: if neither is set.
    """
    configured = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
    folder = configured if configured is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise CriticError(
            f"no critic is configured: additional_config has {CONFIG_KEY}={configured!r} and the environment has "
            f"{ENVIRONMENT_VARIABLE}={os.environ.get(ENVIRONMENT_VARIABLE)!r}.",
            f"set {ENVIRONMENT_VARIABLE}=<folder>, or pass additional_config={{{CONFIG_KEY!r}: <folder>}}.",
        )
    return str(Path(folder).expanduser())


@lru_cache(maxsize=8)
def describe_for_engine(folder: str, engine: str) -> Critic:
    """Describe the critic in a folder, once per engine; see `Critic.describe`.

    The processes of an engine read the folder at different times, so it must not be replaced while it is served. The
    next engine reads it again.

    Args:
        folder: the critic's.
        engine: identifies the engine within this process.
    """
    return Critic.describe(folder)


def load_served_critic(
    folder: str, model: str, hidden_size: int, vocab_size: int
) -> HiddenStateCritic | ValueModelCritic:
    """Load the critic for a model that an engine serves.

    For a model in a local folder the weights are compared too, and a mismatch causes a warning.

    Args:
        folder: the critic's.
        model: folder or name of the model.
        hidden_size: H of the model.
        vocab_size: V of the model.

    Returns:
        The critic, in evaluation mode and on the CPU.

    Raises:
        CriticError: if the folder holds none, it cannot be served, or it was trained for a model of another shape.
    """
    description = Critic.describe(folder)
    check_servable(description, f"critic {folder!r}")
    trained_on = description.fingerprint
    if (trained_on.hidden_size, trained_on.vocab_size) != (hidden_size, vocab_size):
        raise CriticError(
            f"critic {folder!r} was trained on a policy with hidden size {trained_on.hidden_size} and "
            f"{trained_on.vocab_size} tokens, but the served model {model!r} has hidden size {hidden_size} and "
            f"{vocab_size} tokens.",
            "serve the policy that the critic was trained on, or train a critic for this one.",
        )
    weights = weights_fingerprint(model)
    if weights is not None and weights != trained_on.weights:
        warn_user(
            f"the served model {model!r} has the shape but not the weights of the policy that critic {folder!r} was "
            "trained on; its values are predictions about that other policy. Train a critic for this one if the tilt "
            "seems weak."
        )
    critic = Critic.from_pretrained(folder)
    assert isinstance(critic, HiddenStateCritic | ValueModelCritic)
    return critic


def check_servable(critic: Critic, name: str) -> None:
    """Refuse a critic that would read every candidate of every request at every step.

    Args:
        critic: to check.
        name: how the error refers to it.

    Raises:
        CriticError: if the critic is neither a hidden-state critic nor a value model with the `token` readout.
    """
    if isinstance(critic, HiddenStateCritic) or (isinstance(critic, ValueModelCritic) and critic.readout == "token"):
        return
    readout = f" with readout {critic.readout!r}" if isinstance(critic, ValueModelCritic) else ""
    raise CriticError(
        f"{name} is a {critic.kind}{readout}, expected a hidden-state critic or a value model with readout 'token'.",
        "distil it into one: mavis distill critics=[<folder>] output=<folder>.",
    )


def needs_every_token(critic: Critic) -> bool:
    """Whether a servable critic has to see every token, because it has a memory or reads the tokens itself."""
    return not isinstance(critic, HiddenStateCritic) or critic.memory is not None


def weights_fingerprint(model: str) -> str | None:
    """Fingerprint the weights of a model folder, tensor by tensor; None if they cannot be read."""
    if not Path(model).is_dir():
        return None
    try:
        return tensors_of(model, "model").fingerprint.weights
    except (MavisError, OSError, ValueError):  # engines can read more formats than transformers
        return None
