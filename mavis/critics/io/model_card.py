"""The model card of a critic: its objectives, policy, training, calibration and efficiency."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mavis.critics.calibration import calibration_directions
from mavis.critics.io.files import SavableCritic
from mavis.policies.names import is_hub_id
from mavis.utils.markdown import markdown_cell, markdown_table


def model_card(critic: SavableCritic) -> str:
    """Return the model card of a critic.

    The name of the policy, the data, the training settings and the efficiency are taken from `critic.about`, and left
    out if they are not there.

    Args:
        critic: any critic but a group.

    Returns:
        Markdown with the YAML header of the hub.
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
        _USE.format(weights=json.dumps({critic.objectives[0]: 1.0}, ensure_ascii=False)),
        "## Objectives",
        "Raw rewards are normalised, R = (raw − mean) / std, with the statistics of the reference policy.",
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

critic = mavis.Critic.from_pretrained("<this folder or repository>")
output = mavis.generate(policy, inputs, critic=critic, weights={weights}, beta=1.0)
```"""


def _policy(critic: SavableCritic, name: Any) -> list[str]:
    fingerprint = critic.fingerprint
    return [
        f"{markdown_cell(name) if name else 'Unnamed policy'}: {fingerprint.model_type}, hidden size "
        f"{fingerprint.hidden_size}, {fingerprint.vocab_size} tokens, fingerprint of its weights "
        f"`{fingerprint.weights}`. A policy of this shape with other weights causes a warning, another shape an error."
    ]


def _training(critic: SavableCritic, about: Mapping[str, Any]) -> list[str]:
    rows: dict[str, Any] = {"kind": critic.kind, "composition": critic.composition}
    rows |= {name: value for name, value in critic.settings().items() if value is None or isinstance(value, _PLAIN)}
    rows |= {"data": about["data"]} if "data" in about else {}
    rows |= about.get("training", {})
    return [markdown_table(("setting", "value"), rows.items())]


_PLAIN = (str, int, float)


def _calibration(critic: SavableCritic) -> list[str]:
    measured = critic.calibration
    if measured is None:
        return ["None: use `beta`, not `target_kl`."]
    directions = [
        ", ".join(f"{name} {share:g}" for name, share in zip(critic.objectives, row, strict=True) if share)
        for row in calibration_directions(len(critic.objectives)).tolist()
    ]
    candidates = "all tokens as candidates" if measured.top_k is None else f"{measured.top_k} candidates per step"
    return [
        f"KL to the reference policy in nats per response, with {candidates}, at temperature "
        f"{measured.temperature:g} and up to {measured.max_new_tokens} tokens.",
        markdown_table(
            ("weights", *(f"β = {beta:g}" for beta in measured.betas)),
            ((name, *row) for name, row in zip(directions, measured.kl, strict=True)),
        ),
    ]


def _efficiency(entries: Sequence[Mapping[str, Any]] | None) -> list[str]:
    if not entries:
        return ["Not measured; `mavis evaluate` measures it and updates this card."]
    return [
        "Reward gain relative to that of the optimal policy at the same KL, on held-out prompts.",
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
