"""`mavis info`: what a critic is for, how it was trained, and what its budgets cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.console import print_line, print_table
from mavis.cli.hydra_app import hydra_app

if TYPE_CHECKING:
    from mavis.critics import Critic


def _print_calibration(critic: Critic) -> None:
    from mavis.critics.calibration import calibration_directions

    measured = critic.calibration
    if measured is None:
        print_line("no calibration: give beta, not target_kl")
        return
    candidates = "every token a candidate" if measured.top_k is None else f"{measured.top_k} candidates a step"
    by_length = zip(measured.lengths or [measured.max_new_tokens], measured.kl_at_lengths or [measured.kl], strict=True)
    print_table(
        f"nats per response at each beta, {candidates}, temperature {measured.temperature:g}",
        [
            {"weights": dict(zip(critic.objectives, row, strict=True)), "tokens": length}
            | {f"{beta:.3g}": value for beta, value in zip(measured.betas, kls, strict=True)}
            for length, kl in by_length
            for row, kls in zip(calibration_directions(len(critic.objectives)).tolist(), kl, strict=True)
        ],
    )


def _run(config: Any) -> None:
    from mavis.critics import Critic

    folder = config.checkpoint
    critic = Critic.describe(folder) if Path(folder).is_dir() else Critic.from_pretrained(folder)
    about = critic.about
    fingerprint = critic.fingerprint
    print_line(f"{critic.kind} critic, {critic.composition} composition")
    print_line(
        f"policy: {about.get('policy') or 'unnamed'} ({fingerprint.model_type}, hidden size {fingerprint.hidden_size}, "
        f"{fingerprint.vocab_size} tokens, weights {fingerprint.weights})"
    )
    print_table(
        "objectives; rewards are normalised by mean and std",
        [
            {"objective": name, "mean": mean, "std": std}
            for name, mean, std in zip(
                critic.objectives, critic.reward_mean.tolist(), critic.reward_std.tolist(), strict=True
            )
        ],
    )
    training = {"data": about["data"]} if "data" in about else {}
    training |= about.get("training") or {}
    if training:
        print_table("training", [{"setting": name, "value": str(value)} for name, value in training.items()])
    _print_calibration(critic)
    if about.get("efficiency"):
        print_table(
            "frontier efficiency on held-out prompts",
            [{name: entry[name] for name in ("weights", "kl", "efficiency")} for entry in about["efficiency"]],
        )
    else:
        print_line("no efficiency: mavis evaluate measures it")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("info")(_run)()


if __name__ == "__main__":
    main()
