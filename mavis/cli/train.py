"""`mavis train`: train a critic for a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import (
    build_critic,
    build_objectives,
    build_sampler,
    describe_prompts,
    improvement_settings,
    load_policy,
    locked_run,
    read_prompts,
)
from mavis.cli.console import print_line, print_table
from mavis.cli.hydra_app import hydra_app
from mavis.cli.progress import progress_reporter

if TYPE_CHECKING:
    from mavis.critics.head_critic import HeadCritic


def train(config: Any, policy: Any, tokenizer: Any, folder: Path) -> HeadCritic:
    """Train a critic as a config describes, and print a table of its iterations.

    Args:
        config: of `conf/train.yaml`.
        policy: the reference policy.
        tokenizer: its tokenizer.
        folder: of this run; the critic is saved in `folder/critic`.

    Returns:
        The critic.
    """
    from mavis.cli.tracking import start_trackers
    from mavis.policies.devices import states_device
    from mavis.training import improve

    objectives = build_objectives(config)
    prompts = read_prompts(config.data.prompts)
    settings = improvement_settings(config)
    critic = build_critic(config, policy, tokenizer, list(objectives), settings.composition)
    critic.about["data"] = describe_prompts(config.data.prompts)
    with (
        locked_run(config, list(objectives), folder),
        build_sampler(config) as sampler,
        start_trackers(config, folder, states_device(policy)) as log,
        progress_reporter() as progress,
    ):
        reports = list(
            improve(
                policy,
                tokenizer,
                critic,
                objectives,
                prompts,
                folder,
                settings,
                sampler=sampler,
                progress=progress,
                log=log,
            )
        )
    print_table(
        f"iterations, {settings.composition} composition; rewards in standard deviations of the reference policy",
        [
            {
                "iteration": report.iteration,
                "goal": name,
                "reward": report.rewards[name],
                "KL (nats)": report.kl[name],
                "J = reward − KL/β": report.goal[name],
                "± standard error": report.goal_error[name],
                "explained by the fit": report.explained.get(name),
            }
            for report in reports
            for name in report.goal
        ],
    )
    return critic


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    policy, tokenizer = load_policy(config.policy)
    train(config, policy, tokenizer, folder)
    print_line(f"critic: {folder / 'critic'}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("train", multi_process=True)(_run)()


if __name__ == "__main__":  # started by a launcher: `accelerate launch -m mavis.cli.train`
    from mavis.cli import main as mavis

    sys.exit(mavis(["train", *sys.argv[1:]]))
