"""`mavis evaluate`: measure a critic and write its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.app import (
    check_objectives_manifest,
    hydra_app,
    load_policy,
    make_objectives,
    progress_bars,
    read_prompts,
    sampling_settings,
    show_table,
)
from mavis.errors import ConfigError

if TYPE_CHECKING:
    from mavis.evaluation import EvaluationReport


def evaluation_settings(config: Any, critic: Any | None = None) -> Any:
    """Build the settings of a sweep from the `evaluation` and `decoding` groups and the seed."""
    from mavis.evaluation import EvaluationSettings

    options = config.evaluation
    return EvaluationSettings(
        divisions=options.divisions,
        betas=tuple(options.betas),
        samples=options.samples,
        reference_samples=options.reference_samples,
        target_kls=tuple(options.target_kls),
        speed_batch=options.speed_batch,
        speed_repeats=options.speed_repeats,
        sampling=sampling_settings(config, options.shard_size, critic),
    )


def evaluate(
    config: Any, policy: Any, tokenizer: Any, critic: Any, folder: Path, *, reference: Path | None = None
) -> EvaluationReport | None:
    """Sweep as a config says, show the result and return the report.

    Args:
        config: of `conf/evaluate.yaml`.
        policy: the reference policy.
        tokenizer: its tokenizer.
        critic: to be measured.
        folder: where the rollouts go.
        reference: where reference rollouts lie that several evaluations share.
    """
    from mavis.evaluation import evaluate as run_evaluation

    held_out = config.evaluation.held_out
    objectives = make_objectives(config, critic.objectives)
    check_objectives_manifest(config, critic.objectives, folder)
    with progress_bars() as progress:
        report = run_evaluation(
            policy,
            tokenizer,
            critic,
            objectives,
            unseen_prompts(config.data),
            folder,
            evaluation_settings(config, critic),
            held_out=make_objectives({"objectives": held_out}) if held_out else None,
            reference=reference,
            progress=progress,
        )
    if report is not None:
        _show(report)
    return report


def unseen_prompts(data: Any) -> list[str]:
    """Read the evaluation prompts, and refuse those that the same `data` group trains on."""
    from omegaconf import OmegaConf

    prompts = read_prompts(data.evaluation_prompts)
    trained = set() if OmegaConf.is_missing(data.prompts, "source") else set(read_prompts(data.prompts))
    seen = [prompt for prompt in prompts if prompt in trained]
    if seen:
        raise ConfigError(
            f"data.evaluation_prompts holds {len(seen)} of the training prompts, such as {seen[0]!r}.",
            "evaluate on prompts that the critic was not trained on; others flatter it.",
        )
    return prompts


def _show(report: EvaluationReport) -> None:
    show_table(
        "sweep on the evaluation prompts; rewards in standard deviations of the reference policy",
        [
            {
                "weights": row.weights if row.beta else "(reference)",
                "beta": row.beta,
                **{f"{name}": value for name, value in row.rewards.items()},
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
    show_table(
        "frontier efficiency: share of the reward gain that is possible at a KL",
        [
            {
                "weights": entry.weights,
                "KL": entry.kl,
                "reward": entry.reward,
                "efficiency": entry.efficiency,
            }
            for entry in report.efficiency
        ],
    )
    if report.speed:
        tilted = report.speed["tilted"]
        print(f"tilted decoding: {tilted['tokens_per_second']:.0f} tokens/s, {tilted['ratio']:.2f} of plain decoding")


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.critics import Critic
    from mavis.evaluation import write_report

    folder = Path(HydraConfig.get().runtime.output_dir)
    critic = Critic.from_pretrained(config.checkpoint)
    policy, tokenizer = load_policy(config.policy)
    report = evaluate(config, policy, tokenizer, critic, folder / "rollouts")
    if report is not None:  # of several processes only the main one has it
        _note_efficiency(critic, Path(config.checkpoint))
        for path in write_report(folder, report):
            print(path)


def _note_efficiency(critic: Any, folder: Path) -> None:
    """Let the card in a critic's folder tell what was measured, unless another critic was saved there meanwhile."""
    from mavis.critics import Critic
    from mavis.critics.io.save import save_description
    from mavis.rollouts.collect import critic_digest

    if not folder.is_dir() or critic_digest(Critic.from_pretrained(folder)) != critic_digest(critic):
        return
    try:
        save_description(critic, folder)
    except OSError as error:  # it may be somebody else's
        print(f"the card in {folder} stays as it is: {error.strerror}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("evaluate", together=True)(_run)()


if __name__ == "__main__":  # as a launcher starts it: `accelerate launch -m mavis.cli.evaluate`
    from mavis.cli import main as mavis

    sys.exit(mavis(["evaluate", *sys.argv[1:]]))
