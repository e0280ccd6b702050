"""The model card of a critic: what it is for, what it was trained on, and how good it is known to be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.markdown import markdown_cell, markdown_table

if TYPE_CHECKING:
    from mavis.critics.base import Critic

CARD = "README.md"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def policy_name(policy: Any) -> str | None:
    """Tell a policy's name: its id on the hub, or of a folder the last part, since the rest is nobody's business.

    Args:
        policy: a causal LM.

    Returns:
        The name, None if the policy does not say.
    """
    name = str(getattr(policy, "name_or_path", "") or "")
    if not name:
        return None
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Say whether a name can be that of a repository on the hub and not of a folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def model_card(critic: Critic) -> str:
    """Write the card of a critic.

    What the critic holds in itself is told always; the name of the policy, the data, the training and the efficiency
    are told as far as `critic.about` knows them.

    Args:
        critic: any critic.

    Returns:
        Markdown with a YAML header that the hub reads.
    """
    from huggingface_hub import ModelCardData

    about = critic.about
    policy = about.get("policy")
    header = ModelCardData(
        library_name="mavis",
        tags=["mavis", "value-guided-decoding"],
        base_model=policy if isinstance(policy, str) and is_hub_id(policy) else None,
    )
    names = ", ".join(critic.objectives)
    lines = [
        f"# Critic: {markdown_cell(names)}",
        "Value heads that steer a causal LM between objectives at decoding time, without touching its weights. Made "
        "with `mavis`:",
        _USE.format(weights=dict.fromkeys(critic.objectives[:1], 1.0), decoding=_decoding(critic)),
        "## Objectives",
        "Raw rewards are normalised, R = (raw − mean) / std, by what the plain policy earns.",
        markdown_table(
            ("objective", "mean", "std"),
            zip(critic.objectives, critic.reward_mean.tolist(), critic.reward_std.tolist(), strict=True),
        ),
        "## Policy",
        *_policy(critic, policy),
        "## Training",
        *_training(critic, about),
        "## Calibration",
        *_calibration(critic),
        "## Frontier efficiency",
        *_efficiency(about.get("efficiency")),
    ]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


_USE = """```python
import mavis

critic = mavis.load_critic("<this folder or repository>")
output = mavis.generate(policy, inputs, critic=critic, weights={weights}, beta=1.0{decoding})
```"""


def _decoding(critic: Critic) -> str:
    """The arguments that make `generate` sample as the critic was trained, as far as it knows."""
    known = critic.calibration
    return "" if known is None else f", top_k={known.top_k}, temperature={known.temperature:g}"


def _policy(critic: Critic, name: Any) -> list[str]:
    mark = critic.fingerprint
    return [
        f"{markdown_cell(name) if name else 'A policy that did not tell its name'}: {mark.model_type}, hidden size "
        f"{mark.hidden_size}, {mark.vocab_size} tokens, fingerprint of its weights `{mark.weights}`. Other weights of "
        "this shape warn, another shape is refused."
    ]


def _training(critic: Critic, about: Mapping[str, Any]) -> list[str]:
    rows: dict[str, Any] = {"kind": critic.kind, "composition": critic.composition}
    rows |= {name: value for name, value in critic.settings().items() if value is None or isinstance(value, _PLAIN)}
    rows |= {"data": about["data"]} if "data" in about else {}
    rows |= about.get("training", {})
    return [markdown_table(("setting", "value"), rows.items())]


_PLAIN = (str, int, float)


def _calibration(critic: Critic) -> list[str]:
    from mavis.critics.calibration import calibration_directions

    measured = critic.calibration
    if measured is None:
        return ["None: it is used with `beta`, not with `target_kl`."]
    directions = [
        ", ".join(f"{name} {share:g}" for name, share in zip(critic.objectives, row, strict=True) if share)
        for row in calibration_directions(len(critic.objectives)).tolist()
    ]
    candidates = "every token a candidate" if measured.top_k is None else f"{measured.top_k} candidates a step"
    return [
        f"KL to the plain policy in nats per response, with {candidates}, at temperature "
        f"{measured.temperature:g} and up to {measured.max_new_tokens} tokens.",
        markdown_table(
            ("weights", *(f"β = {beta:g}" for beta in measured.betas)),
            ((name, *row) for name, row in zip(directions, measured.kl, strict=True)),
        ),
    ]


def _efficiency(entries: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not entries:
        return ["Not measured yet; `mavis evaluate` measures it and writes it here."]
    return [
        "Share of the reward gain that any policy could have at the same KL, on prompts that it was not trained on.",
        markdown_table(
            ("weights", "KL (nats)", "efficiency"),
            (
                (
                    ", ".join(f"{name} {weight:g}" for name, weight in entry["weights"].items() if weight),
                    entry["kl"],
                    entry["efficiency"],
                )
                for entry in entries
            ),
        ),
    ]
