"""Train a critic for an objective of your own, a Python function, and steer by it.

python examples/train_your_own.py --output outputs/animals
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import mavis
from mavis.rewards import Positive
from mavis.rollouts import RolloutSettings, load_prompts
from mavis.training import ImprovementSettings, improve


def animals(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Reward stories about animals: the share of words that name one."""
    names = {"dog", "cat", "bird", "bunny", "bear", "fish", "duck", "frog", "horse", "puppy", "kitten", "mouse"}
    words = [response.lower().replace(".", " ").replace(",", " ").split() for response in responses]
    return [sum(word in names for word in each) / max(len(each), 1) for each in words]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Train a critic for an objective of your own.")
    parser.add_argument("--output", default="outputs/animals")
    parser.add_argument("--rollouts", type=int, default=1024, help="responses per iteration")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)

    policy, tokenizer = mavis.embedded.load()
    objectives = {"animals": animals, "positive": Positive()}
    critic = mavis.HiddenStateCritic.for_policy(policy, list(objectives))
    settings = ImprovementSettings(
        iterations=options.iterations,
        rollouts=options.rollouts,
        calibration_samples=16,
        sampling=RolloutSettings(max_new_tokens=options.max_new_tokens),
    )
    prompts = load_prompts(str(mavis.embedded.path() / "openings.txt"))  # or any list of texts
    for report in improve(policy, tokenizer, critic, objectives, prompts, options.output, settings):
        print(f"iteration {report.iteration}: rewards {report.rewards}, KL {report.kl}")

    inputs = tokenizer(["Once upon a time"] * 4, return_tensors="pt")
    for weights in ({"animals": 1.0}, {"positive": 1.0}):
        torch.manual_seed(0)
        output = mavis.generate(
            policy, inputs, critic=critic, weights=weights, beta=8.0, max_new_tokens=options.max_new_tokens
        )
        print(weights)
        print("\n".join(f"  {text}" for text in tokenizer.batch_decode(output, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
