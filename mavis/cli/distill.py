"""`mavis distill`: distill several critics into one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mavis.cli.build import build_critic, describe_prompts, distill_settings, load_policy, read_prompts
from mavis.cli.console import print_line, print_table
from mavis.cli.hydra_app import hydra_app
from mavis.cli.progress import progress_reporter
from mavis.errors import ConfigError


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.cli.tracking import start_trackers
    from mavis.critics import Critic
    from mavis.policies.devices import states_device
    from mavis.training import distill

    folder = Path(HydraConfig.get().runtime.output_dir)
    teacher_folders = [config.critics] if isinstance(config.critics, str) else config.critics
    if not teacher_folders:
        raise ConfigError("critics is empty.", "name at least one critic's folder.")
    teachers = [Critic.from_pretrained(teacher) for teacher in teacher_folders]
    policy, tokenizer = load_policy(config.policy)
    prompts = read_prompts(config.data.prompts)
    settings = distill_settings(config)
    objectives = list(dict.fromkeys(name for teacher in teachers for name in teacher.objectives))
    student = build_critic(config, policy, tokenizer, objectives, "independent")
    student.about["data"] = describe_prompts(config.data.prompts)
    with start_trackers(config, folder, states_device(policy)) as log, progress_reporter() as progress:
        report = distill(student, teachers, policy, tokenizer, prompts, folder, settings, progress=progress, log=log)
    print_table(
        "share of the variance of the teachers' values that the student explains, on held-out rollouts",
        [
            {
                "objective": name,
                "all": report.explained[name],
                "between candidates": report.between_candidates[name],
            }
            for name in report.explained
        ],
    )
    print_line(f"critic: {folder / 'critic'}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("distill", multi_process=True)(_run)()


if __name__ == "__main__":  # started by a launcher: `accelerate launch -m mavis.cli.distill`
    from mavis.cli import main as mavis

    sys.exit(mavis(["distill", *sys.argv[1:]]))
