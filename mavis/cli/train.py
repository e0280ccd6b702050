"""`mavis train`: train a critic for a policy."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mavis.cli.app import (
    check_objectives_manifest,
    data_name,
    hydra_app,
    load_policy,
    make_objectives,
    progress_bars,
    read_prompts,
    sampling_settings,
    say,
    show_table,
)


def train(config: Any, policy: Any, tokenizer: Any, folder: Path) -> Any:
    """Train a critic as a config says, show each iteration, and return the critic.

    Args:
        config: of `conf/train.yaml`.
        policy: the reference policy.
        tokenizer: its tokenizer.
        folder: of this run; the critic ends in `folder/critic`.
    """
    from mavis.cli.tracking import trackers
    from mavis.policies.devices import states_device
    from mavis.training.improvement.fit import FitSettings
    from mavis.training import ImprovementSettings, improve

    objectives = make_objectives(config)
    prompts = read_prompts(config.data.prompts)
    options = config.improvement
    settings = ImprovementSettings(
        composition=options.composition,
        iterations=options.iterations,
        rollouts=options.rollouts,
        reuse=options.reuse,
        beta=config.beta,
        zeta=options.zeta,
        min_beta=options.min_beta,
        max_beta=options.max_beta,
        later_rate=options.later_rate,
        calibration_samples=options.calibration_samples,
        sampling=sampling_settings(config, options.shard_size),
        fit=FitSettings(**options.fit),
    )
    critic = make_critic(config, policy, tokenizer, list(objectives), options.composition)
    critic.about["data"] = data_name(config.data.prompts)
    check_objectives_manifest(config, list(objectives), folder)
    with (
        make_sampler(config) as sampler,
        trackers(config, folder, states_device(policy)) as log,
        progress_bars() as progress,
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
    show_table(
        f"iterations, {options.composition} composition; rewards in standard deviations of the reference policy",
        [
            {
                "iteration": report.iteration,
                "goal": name,
                "reward": report.rewards[name],
                "KL (nats)": report.kl[name],
                "J = reward − KL/β": report.goal[name],
                "± its error": report.goal_error[name],
                "explained by the fit": report.explained.get(name),
            }
            for report in reports
            for name in report.goal
        ],
    )
    return critic


def make_critic(config: Any, policy: Any, tokenizer: Any, objectives: list[str], composition: str) -> Any:
    """Build the untrained critic that a `critic` group describes.

    Args:
        config: with that group and a seed.
        policy: the reference policy.
        tokenizer: its tokenizer.
        objectives: their names.
        composition: `independent` or `conditioned`.

    Raises:
        ConfigError: if there is no such kind of critic.
    """
    from mavis.critics import HiddenStateCritic, ValueModelCritic
    from mavis.errors import ConfigError, closest

    options: dict[str, Any] = dict(config.critic)
    kind = options.pop("kind")
    options |= {"composition": composition, "seed": config.seed}
    if kind == HiddenStateCritic.kind:
        return HiddenStateCritic.for_policy(policy, objectives, **options)
    if kind == ValueModelCritic.kind:
        return ValueModelCritic.for_policy(policy, objectives, tokenizer=tokenizer, **options)
    raise ConfigError(f"critic.kind is {kind!r}.", closest(str(kind), [HiddenStateCritic.kind, ValueModelCritic.kind]))


def make_sampler(config: Any) -> AbstractContextManager[Any]:
    """Build what draws the rollouts, as a `sampler` group describes it; a `with` block ends it.

    Args:
        config: with that group.

    Raises:
        ConfigError: if there is no such sampler.
    """
    from omegaconf import OmegaConf

    from mavis.errors import ConfigError, closest
    from mavis.rollouts.sampler import GENERATE_SAMPLER
    from mavis.vllm.sampler import VllmSampler

    kind = str(config.sampler.kind)
    options: Any = OmegaConf.to_container(config.sampler.options)
    if kind == GENERATE_SAMPLER.name:
        return nullcontext(GENERATE_SAMPLER)
    if kind == VllmSampler.name:
        return VllmSampler(**options)
    raise ConfigError(f"sampler.kind is {kind!r}.", closest(kind, [GENERATE_SAMPLER.name, VllmSampler.name]))


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    policy, tokenizer = load_policy(config.policy)
    train(config, policy, tokenizer, folder)
    say(f"critic: {folder / 'critic'}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("train", together=True)(_run)()


if __name__ == "__main__":  # as a launcher starts it: `accelerate launch -m mavis.cli.train`
    from mavis.cli import main as mavis

    sys.exit(mavis(["train", *sys.argv[1:]]))
