"""The critic of a serving engine: where it is named, and whether it fits the model that is served."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mavis.critics import Critic, HiddenStateCritic, ValueModelCritic
from mavis.errors import CriticError, MavisError
from mavis.vectors.model_tensors import tensors_of

ENVIRONMENT, SETTING = "MAVIS_CRITIC", "mavis_critic"


def critic_folder(additional_config: object) -> str:
    """Find out which critic an engine is to use.

    Args:
        additional_config: the engine's own; its entry `mavis_critic` goes before the environment's `MAVIS_CRITIC`.

    Returns:
        The folder.

    Raises:
        CriticError: if neither names one.
    """
    named = additional_config.get(SETTING) if isinstance(additional_config, Mapping) else None
    folder = named if named is not None else os.environ.get(ENVIRONMENT)
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise CriticError(
            f"no critic is named: additional_config has {SETTING}={named!r} and the environment "
            f"{ENVIRONMENT}={os.environ.get(ENVIRONMENT)!r}.",
            f"set {ENVIRONMENT}=<critic folder>, or pass additional_config={{{SETTING!r}: <critic folder>}}.",
        )
    return str(Path(folder).expanduser())


@lru_cache(maxsize=8)
def described(folder: str, engine: str) -> Critic:
    """Read what a critic folder says of its critic, once for each engine; see `Critic.describe`.

    The processes of an engine read it at different times, so a folder is not to be replaced while it is served. A later
    engine reads it again.

    Args:
        folder: the critic's.
        engine: a name that no other engine of this process has.
    """
    return Critic.describe(folder)


def served_critic(folder: str, model: str, hidden_size: int, vocab_size: int) -> HiddenStateCritic | ValueModelCritic:
    """Load the critic for a model that an engine serves.

    Args:
        folder: the critic's.
        model: folder or name of the model.
        hidden_size: H of the model.
        vocab_size: V of the model.

    Returns:
        The critic, in evaluation mode and on the CPU. Of a model in a local folder the weights are compared too, and
        other ones than the critic was trained on warn.

    Raises:
        CriticError: if there is none, it reads every candidate anew, or the model has another shape.
    """
    kind = Critic.describe(folder)
    check_servable(kind, f"critic {folder!r}")
    made_for = kind.fingerprint
    if (made_for.hidden_size, made_for.vocab_size) != (hidden_size, vocab_size):
        raise CriticError(
            f"critic {folder!r} was made for a policy with hidden size {made_for.hidden_size} and "
            f"{made_for.vocab_size} tokens, but the served model {model!r} has hidden size {hidden_size} and "
            f"{vocab_size} tokens.",
            "serve the policy that the critic was trained on, or train a critic for this one.",
        )
    weights = weights_of(model)
    if weights is not None and weights != made_for.weights:
        warnings.warn(
            f"the served model {model!r} has the shape but not the weights of the policy that critic {folder!r} was "
            "trained on; its values are predictions about that other policy. Train a critic for this one if the tilt "
            "seems weak.",
            UserWarning,
            stacklevel=2,
        )
    critic = Critic.from_pretrained(folder)
    assert isinstance(critic, HiddenStateCritic | ValueModelCritic)
    return critic


def check_servable(critic: Critic, who: str) -> None:
    """Refuse a critic that would read every candidate of every request in every step.

    Raises:
        CriticError: naming it and what to do.
    """
    if isinstance(critic, HiddenStateCritic) or (isinstance(critic, ValueModelCritic) and critic.readout == "token"):
        return
    readout = f" in the readout {critic.readout!r}" if isinstance(critic, ValueModelCritic) else ""
    raise CriticError(
        f"{who} is a {critic.kind}{readout}, expected one of hidden states, or a value model in the readout 'token'.",
        "make one of it: mavis distill critics=[<folder>] output=<folder>.",
    )


def follows_tokens(critic: Critic) -> bool:
    """Whether a critic that is servable has to know of every token: it remembers states, or reads the tokens itself."""
    return not isinstance(critic, HiddenStateCritic) or critic.memory is not None


def weights_of(model: str) -> str | None:
    """Take the fingerprint of a model folder's weights, tensor by tensor, or None where it cannot be read."""
    if not Path(model).is_dir():
        return None
    try:
        return tensors_of(model, "model").fingerprint.weights
    except (MavisError, OSError, ValueError):  # what the engine can read, transformers need not
        return None
