"""Compare the plain policy, best-of-n, tilted policies and the optimum on the same prompts.

python examples/compare_policies.py outputs/mine/critic outputs/other/critic
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mavis
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.rewards import Dialogue, Positive
from mavis.rollouts import RolloutSettings

PROMPTS = ["Once upon a time", "One day, a little girl", "Lily wanted to"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Compare critics on the same prompts.")
    parser.add_argument("critics", nargs="*", help="critic folders for positive and dialogue; the one that ships")
    parser.add_argument("--output", default="outputs/comparison")
    parser.add_argument("--kl", type=float, default=1.0, help="where to compare, in nats per response")
    parser.add_argument("--samples", type=int, default=32, help="responses per prompt, weights and β")
    parser.add_argument("--reference-samples", type=int, default=1024, help="plain responses per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)

    policy, tokenizer = mavis.embedded.load()
    objectives = {"positive": Positive(), "dialogue": Dialogue()}
    settings = EvaluationSettings(
        divisions=2,  # of the grid of weights: (1, 0), (½, ½), (0, 1)
        betas=(1.0, 3.0, 6.0),
        samples=options.samples,
        reference_samples=options.reference_samples,
        target_kls=(options.kl,),
        speed_repeats=0,
        sampling=RolloutSettings(max_new_tokens=options.max_new_tokens),
    )
    output = Path(options.output)
    for number, folder in enumerate(options.critics or [mavis.embedded.critic_path()]):
        critic = mavis.Critic.from_pretrained(folder)
        report = evaluate(
            policy,
            tokenizer,
            critic,
            objectives,
            PROMPTS,
            output / f"critic-{number}",
            settings,
            reference=output,  # plain responses are sampled once for all critics
        )
        print(f"{folder}: mean efficiency {number_or_dash(report.mean_efficiency())}")
        for found, limit in zip(report.efficiency, report.limits, strict=True):
            best = ", ".join(f"best of {one.n} {one.reward:.2f} (KL {one.kl:.2f})" for one in limit.best_of_n)
            print(f"  {found.weights}")
            print(f"    plain policy {limit.reward[0]:.2f}; {best}")
            print(
                f"    tilted at KL {found.kl:g}: reward {number_or_dash(found.reward)}, "
                f"efficiency {number_or_dash(found.efficiency)}"
            )


def number_or_dash(value: float | None) -> str:
    """Format a number; a dash where the sweep does not reach the KL or the limit cannot be trusted."""
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
