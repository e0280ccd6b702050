"""`mavis distill`: make one critic of several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mavis.cli.app import (
    data_name,
    hydra_app,
    load_policy,
    progress_bars,
    read_prompts,
    sampling_settings,
    say,
    show_table,
)
from mavis.cli.train import make_critic
from mavis.errors import ConfigError


def distillation_settings(config: Any) -> Any:
    """Build the settings of a distillation from the `distillation` and `decoding` groups and the seed."""
    from mavis.training.distillation.loop import DistillSettings
    from mavis.training.regression import RegressionSettings

    options = config.distillation
    return DistillSettings(
        rollouts=options.rollouts,
        candidates=options.candidates,
        sampling=sampling_settings(config, options.shard_size),
        fit=RegressionSettings(**options.fit),
    )


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.cli.tracking import trackers
    from mavis.critics import Critic
    from mavis.policies.devices import states_device
    from mavis.training.distillation.loop import distill

    folder = Path(HydraConfig.get().runtime.output_dir)
    folders = [config.critics] if isinstance(config.critics, str) else config.critics
    if not folders:
        raise ConfigError("critics is empty.", "name at least one critic's folder.")
    teachers = [Critic.from_pretrained(place) for place in folders]
    policy, tokenizer = load_policy(config.policy)
    prompts = read_prompts(config.data.prompts)
    settings = distillation_settings(config)
    objectives = list(dict.fromkeys(name for teacher in teachers for name in teacher.objectives))
    student = make_critic(config, policy, tokenizer, objectives, "independent")
    student.about["data"] = data_name(config.data.prompts)
    with trackers(config, folder, states_device(policy)) as log, progress_bars() as progress:
        report = distill(student, teachers, policy, tokenizer, prompts, folder, settings, progress=progress, log=log)
    show_table(
        "what the student explains of its teachers' values on rollouts that were held out",
        [
            {
                "objective": name,
                "of all variance": report.explained[name],
                "of that between candidates": report.between_candidates[name],
            }
            for name in report.explained
        ],
    )
    say(f"critic: {folder / 'critic'}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("distill", together=True)(_run)()


if __name__ == "__main__":  # as a launcher starts it: `accelerate launch -m mavis.cli.distill`
    from mavis.cli import main as mavis

    sys.exit(mavis(["distill", *sys.argv[1:]]))
