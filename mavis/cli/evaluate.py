"""`mavis evaluate`: evaluate a critic and write the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import (
    build_objectives,
    checkpoint_folders,
    evaluation_settings,
    load_critic,
    load_policy,
    locked_run,
    read_evaluation_prompts,
)
from mavis.cli.console import print_line, print_table
from mavis.cli.hydra_app import hydra_app
from mavis.cli.known_objectives import add_known_objectives, check_same_objectives
from mavis.cli.progress import progress_reporter

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.evaluation import EvaluationReport
    from mavis.rewards import Objective


def evaluate(
    config: Any,
    policy: Any,
    tokenizer: Any,
    critic: Critic,
    objectives: Mapping[str, Objective],
    folder: Path,
    *,
    reference: Path | None = None,
) -> EvaluationReport | None:
    """Evaluate a critic as a config describes, and print the result.

    Args:
        config: of `conf/evaluate.yaml`.
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to evaluate.
        objectives: the critic's, in its order.
        folder: where the rollouts are written.
        reference: the folder of reference rollouts that several evaluations share; None is `folder`.

    Returns:
        The report; None in processes other than the main one.
    """
    from mavis.evaluation import evaluate as run_evaluation

    held_out = config.evaluation.get("held_out")
    with locked_run(config, critic.objectives, folder), progress_reporter() as progress:
        report = run_evaluation(
            policy,
            tokenizer,
            critic,
            objectives,
            read_evaluation_prompts(config.data),
            folder,
            evaluation_settings(config, critic),
            held_out=build_objectives({"objectives": held_out}) if held_out else None,
            reference=reference,
            progress=progress,
        )
    if report is not None:
        _print_report(report)
    return report


def _print_report(report: EvaluationReport) -> None:
    print_table(
        "sweep on the evaluation prompts; rewards in standard deviations of the reference policy",
        [
            {
                "weights": row.weights if row.beta else "(reference)",
                "beta": row.beta,
                **row.rewards,
                "KL": row.kl,
                "efficiency": row.efficiency,
                "tokens": row.length,
                "distinct-2": row.distinct_2,
                "perplexity": row.perplexity,
                **(row.held_out or {}),
            }
            for row in report.rows
        ],
    )
    print_table(
        "frontier efficiency: share of the largest possible reward gain at a KL",
        [
            {"weights": entry.weights, "KL": entry.kl, "reward": entry.reward, "efficiency": entry.efficiency}
            for entry in report.efficiency
        ],
    )
    for entry in report.efficiency:
        if entry.reason is not None:
            weights = ", ".join(f"{name} {weight:g}" for name, weight in entry.weights.items() if weight)
            print_line(f"no efficiency at {weights}, KL {entry.kl:g}: {entry.reason}")
    if report.speed:
        tilted = report.speed["tilted"]
        print(f"tilted decoding: {tilted['tokens_per_second']:.0f} tokens/s, {tilted['ratio']:.2f} of plain decoding")


def update_model_card(critic: Critic, folder: str | os.PathLike[str]) -> None:
    """Add the measured efficiency to the model card in a critic's folder.

    Nothing is written if the folder meanwhile holds another critic, is not a folder (but a repository on the hub), or
    is read-only.

    Args:
        critic: loaded from there, and evaluated since.
        folder: of the critic.
    """
    from mavis.critics import Critic
    from mavis.critics.io.save import save_description
    from mavis.rollouts.collect import critic_digest

    path = Path(folder)
    if not path.is_dir() or critic_digest(Critic.from_pretrained(path)) != critic_digest(critic):
        return
    try:
        save_description(critic, path)
    except OSError as error:
        print(f"the model card in {path} is not updated: {error.strerror}")


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.distributed import join_processes
    from mavis.evaluation import write_report
    from mavis.utils.locks import locked_folder

    folder = Path(HydraConfig.get().runtime.output_dir)
    with locked_folder(folder, join_processes().is_main):
        folders = checkpoint_folders(config.checkpoint)
        critic = load_critic(folders)
        add_known_objectives(config, folders, critic.objectives)
        objectives = build_objectives(config, critic.objectives)
        check_same_objectives(objectives, folders)
        policy, tokenizer = load_policy(config.policy)
        is_finished = (folder / "report.json").is_file()
        report = evaluate(config, policy, tokenizer, critic, objectives, folder / "rollouts")
        if report is None:
            return
        if is_finished:
            print(f"rollouts of the finished run in {folder} reused", file=sys.stderr)
        if len(folders) == 1:  # the efficiency of several is that of none of them
            update_model_card(critic, folders[0])
        for path in write_report(folder, report):
            print(path)


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("evaluate", multi_process=True)(_run)()


if __name__ == "__main__":  # started by a launcher: `accelerate launch -m mavis.cli.evaluate`
    from mavis.cli import main as mavis

    sys.exit(mavis(["evaluate", *sys.argv[1:]]))
