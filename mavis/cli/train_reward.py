"""`mavis train-reward`: train a reward model from preference pairs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import load_policy, plain
from mavis.cli.console import print_note, print_table
from mavis.cli.hydra_app import hydra_app
from mavis.cli.overrides import literal_override
from mavis.cli.progress import progress_reporter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mavis.training import RewardModelReport


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.data import load_pairs
    from mavis.evaluation.reliability import plot_reliability
    from mavis.training import RewardModelSettings, load_backbone, train_reward_model

    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = RewardModelSettings(**plain(config.reward_model), seed=config.seed)
    pairs = load_pairs(plain(config.pairs), split=config.split, system=config.system, report=print_note)
    if config.backbone is None:
        backbone, tokenizer = load_policy(config.policy)
    else:
        options = {name: config.policy[name] for name in ("device", "trust_remote_code") if name in config.policy}
        backbone, tokenizer = load_backbone(config.backbone, **options)
    with progress_reporter() as progress:
        report = train_reward_model(backbone, tokenizer, pairs, folder, settings, progress=progress)
    if not (folder / "reliability.png").is_file():
        plot_reliability(folder / "reliability.png", report.reliability)
    _print_report(report, HydraConfig.get().overrides.task)


def _print_report(report: RewardModelReport, overrides: Sequence[str]) -> None:
    preferred = [
        ("higher reward", report.accuracy, report.accuracy_error),
        ("longer", report.longer_accuracy, report.longer_error),
        ("shorter", report.baseline_accuracy, report.longer_error),
        (f"reward − {report.baseline}", report.gain, report.gain_error),
    ]
    if report.baseline == "longer":
        del preferred[2]
    rows = [{"preferred": name, "accuracy": share, "± standard error": error} for name, share, error in preferred]
    print_table(f"{report.held_out_pairs} held-out pairs of {report.held_out_prompts} prompts", rows)
    print_table(
        "the scores",
        [
            {
                "log loss": report.log_loss,
                "calibration error": report.calibration_error,
                "correlation with length": report.length_correlation,
                "slope per 100 characters": report.length_slope,
                "length penalty": report.length_penalty,
                "texts cut": report.cut_texts,
            }
        ],
    )
    print_table("accuracy by how sure the scores are", report.reliability)
    print(f"reward model: {report.folder}")
    policy = [override for override in overrides if override.partition("=")[0].split(".")[0] == "policy"]
    model = literal_override("objectives.reward_model.model", report.folder)
    print(f"use: {shlex.join(['mavis', 'train', *policy, 'objective=reward_model', model])}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("train-reward")(_run)()


if __name__ == "__main__":
    main()
