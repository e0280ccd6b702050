"""Does a budget hold at other lengths? KL that `target_kl` spends at ½, 1, 2 and 4 times the calibrated length.

    python benchmarks/bench_budgets.py --critic FOLDER

Prompts are openings that the critic was neither trained nor calibrated on. One row per weights, budget and length: the
mean KL of the responses in nats, and its standard error.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from lib import results

import mavis
from mavis.policies import embedded

WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
BUDGETS = (1.0, 2.0)
MULTIPLES = (0.5, 1, 2, 4)
PROMPTS = (
    "Once upon a time",
    "One day, a little girl",
    "Tom and Jane were",
    "The old man looked at",
    "Lily wanted to",
    "Ben had a red kite",
    "In a small house near the sea",
    "Mia and her dad went to",
    "The little dog was hungry",
    "Sam found a shiny stone",
    "It was a cold morning and",
    "Anna's grandma made",
    "A big bear lived in",
    "The two friends liked to",
    "Max was afraid of",
    "After dinner, the family",
)
"""None is an opening that the critic was trained or calibrated on."""


def main() -> None:
    """Measure and write `results/budgets.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--critic", default=str(embedded.critic_path()), help="folder of a calibrated critic")
    parser.add_argument("--samples", type=int, default=16, help="responses for each prompt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy, tokenizer = embedded.load()
    critic = mavis.Critic.from_pretrained(arguments.critic)
    seen = set((embedded.path() / "openings.txt").read_text("utf-8").splitlines())
    prompts = [prompt for prompt in PROMPTS if prompt not in seen]
    assert critic.calibration is not None
    rows = []
    for weights in WEIGHTS:
        for budget in BUDGETS:
            for multiple in MULTIPLES:
                length = int(critic.calibration.max_new_tokens * multiple)
                spent = spend(policy, tokenizer, critic, prompts * arguments.samples, weights, budget, length)
                error = float(spent.std()) / math.sqrt(len(spent))
                rows.append(
                    {
                        "weights": list(weights),
                        "target_kl": budget,
                        "length": length,
                        "kl": round(float(spent.mean()), 4),
                        "error": round(error, 4),
                    }
                )
                print(rows[-1], flush=True)
    config = {"critic": Path(arguments.critic).name, "samples": arguments.samples, "prompts": len(prompts)}
    config["trained_length"] = critic.calibration.max_new_tokens
    results.write("budgets", config, rows)


def spend(
    policy: Any,
    tokenizer: Any,
    critic: mavis.Critic,
    prompts: list[str],
    weights: tuple[float, ...],
    budget: float,
    length: int,
) -> torch.Tensor:
    """Sample a response to each prompt under a budget, and return the KL of each, (B,) in nats."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tilt = mavis.MavisTilt(list(weights), critic, target_kl=budget, max_new_tokens=length, record_kl=True)
    torch.manual_seed(0)
    with critic.attached_to(policy):
        policy.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            temperature=tilt.temperature,
            max_new_tokens=length,
            logits_processor=tilt,
        )
    return tilt.kl.sum(1)


if __name__ == "__main__":
    main()
