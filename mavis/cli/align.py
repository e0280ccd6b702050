"""`mavis align`: fine-tune a copy of a policy for an objective or a weighted sum of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import (
    align_settings,
    build_objectives,
    load_policy,
    locked_run,
    plain,
    read_prompts,
)
from mavis.cli.console import print_table
from mavis.cli.hydra_app import hydra_app
from mavis.cli.progress import progress_reporter

if TYPE_CHECKING:
    from mavis.training import AlignReport


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.training import align

    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = align_settings(config)
    objectives = build_objectives(config)
    weights = plain(config.weights) if config.weights is not None else [1 / len(objectives)] * len(objectives)
    prompts, evaluation_prompts = read_prompts(config.data.prompts), read_prompts(config.data.evaluation_prompts)
    policy, tokenizer = load_policy(config.policy)
    with locked_run(config, list(objectives), folder), progress_reporter() as progress:
        report = align(
            policy,
            tokenizer,
            objectives,
            weights,
            prompts,
            folder,
            settings,
            evaluation_prompts=evaluation_prompts,
            progress=progress,
        )
    _print_report(report)
    print(f"aligned: {report.folder}")


def _print_report(report: AlignReport) -> None:
    total: dict[str, Any] = {
        "objective": "weighted sum",
        "weights": report.weights,
        "reward before": report.reward_before,
        "reward after": report.reward_after,
        "± standard error": report.reward_error,
        "KL (nats)": report.kl,
        "J = reward − KL/β": report.goal,
    }
    by_objective = [
        dict.fromkeys(total) | {"objective": name, "reward before": report.rewards_before[name], "reward after": reward}
        for name, reward in report.rewards_after.items()
    ]
    print_table("alignment; rewards in standard deviations of the reference policy", [total, *by_objective])


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("align")(_run)()


if __name__ == "__main__":
    main()
