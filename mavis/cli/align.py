"""`mavis align`: fine-tune a copy of a policy for an objective or a weighted sum of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mavis.cli.app import (
    check_objectives_manifest,
    hydra_app,
    load_policy,
    make_objectives,
    progress_bars,
    read_prompts,
    show_table,
)


def align_settings(config: Any) -> Any:
    """Build the settings of the alignment from the `alignment` node, β and the seed."""
    from mavis.training.alignment.settings import AlignSettings

    return AlignSettings(**config.alignment, beta=config.beta, seed=config.seed)


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mavis.training.alignment.loop import align

    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = align_settings(config)
    objectives = make_objectives(config)
    weights: Any = [1 / len(objectives)] * len(objectives)
    if config.weights is not None:
        weights = OmegaConf.to_container(config, resolve=True)["weights"]  # type: ignore[index, call-overload]
    prompts, evaluation_prompts = read_prompts(config.data.prompts), read_prompts(config.data.evaluation_prompts)
    policy, tokenizer = load_policy(config.policy)
    check_objectives_manifest(config, list(objectives), folder)
    with progress_bars() as progress:
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
    show_table(
        "alignment; rewards in standard deviations of the reference policy",
        [
            {
                "objective": "weighted sum",
                "weights": report.weights,
                "reward before": report.reward_before,
                "reward after": report.reward_after,
                "± its error": report.reward_error,
                "KL (nats)": report.kl,
                "J = reward − KL/β": report.goal,
            },
            *(
                {"objective": name, "weights": None, "before": report.rewards_before[name], "after": after}
                | {"error": None, "kl": None, "goal": None}
                for name, after in report.rewards_after.items()
            ),
        ],
    )
    print(f"aligned: {report.folder}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("align")(_run)()


if __name__ == "__main__":
    main()
