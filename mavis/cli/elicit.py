"""`mavis elicit`: infer a user's preference weights from choices between two responses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import (
    build_objectives,
    checkpoint_folders,
    load_critic,
    load_policy,
    locked_run,
    read_prompts,
    rollout_settings,
)
from mavis.cli.console import print_table, terminal_text
from mavis.cli.hydra_app import hydra_app
from mavis.cli.known_objectives import add_known_objectives, check_same_objectives
from mavis.cli.overrides import literal_override
from mavis.errors import ConfigError, DataError
from mavis.utils.files import write_json

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.preference import CandidatePairs, InferredWeights, Pair
    from mavis.rewards import Objective

_PROMPT = "--- 1 or 2 for the one you prefer, 0 to skip, q to stop: "
# Overrides that `mavis generate` needs as well, to decode in the same way.
_SHARED_OVERRIDES = ("policy", "decoding", "beta=", "target_kl=")


def _ask(config: Any, critic: Critic, objectives: dict[str, Objective], folder: Path) -> list[Pair]:
    """Ask until there are `questions` answers; return the answered pairs of this and earlier calls."""
    import torch

    from mavis.preference import next_pair, reward_differences
    from mavis.preference.pairs import read_answers, write_answers

    path = folder / "answers.jsonl"
    answers = read_answers(path) if path.is_file() else []
    differences = torch.zeros(0, len(critic.objectives), dtype=torch.float64)
    if answered := [pair for pair, is_skipped in answers if not is_skipped]:
        differences = reward_differences(answered, objectives, critic)
    if len(differences) >= config.questions:
        return answered
    pool = _sample_pairs(config, critic, objectives, folder)
    known = {pair for pair, _ in answers}
    asked = {i for i, pair in enumerate(pool.pairs) if pair in known or pair.swapped() in known}
    while len(differences) < config.questions and len(asked) < len(pool.pairs):
        index = next_pair(pool.differences, differences, asked)
        pair, difference = pool.pairs[index], pool.differences[index : index + 1]
        print(f"\n=== question {len(differences) + 1} of {config.questions}")
        choice = _read_choice(pair)
        if choice is None:
            break
        asked.add(index)
        if choice == 2:
            pair, difference = pair.swapped(), -difference
        if choice:
            differences = torch.cat([differences, difference])
        answers.append((pair, choice == 0))
        write_answers(path, answers)
    else:
        if len(differences) < config.questions:
            print(
                f"\nAll pairs have been asked. To sample more, choose a new output folder and "
                f"prompts={2 * config.prompts}."
            )
    return [pair for pair, is_skipped in answers if not is_skipped]


def _sample_pairs(config: Any, critic: Critic, objectives: dict[str, Objective], folder: Path) -> CandidatePairs:
    from mavis.preference import candidate_pairs

    prompts = read_prompts(config.data.prompts)[: config.prompts]
    with locked_run(config, critic.objectives, folder):
        policy, tokenizer = load_policy(config.policy)
        print(f"sampling responses to {len(prompts)} prompts ...", flush=True)
        return candidate_pairs(
            policy,
            tokenizer,
            critic,
            objectives,
            prompts,
            folder / "responses",
            rollout_settings(config, config.shard_size, critic),
            beta=config.beta,
            target_kl=config.target_kl,
            divisions=config.divisions,
        )


def _read_choice(pair: Pair) -> int | None:
    """Show two responses and read which one is preferred; 0 for neither, None to stop."""
    for number, response in enumerate((pair.chosen, pair.rejected), 1):
        print(f"--- {number}\n{terminal_text(f'{pair.prompt}{response}')}")
    while True:
        try:
            answer = input(_PROMPT).strip().lower()
        except EOFError:
            print()
            return None
        if answer in ("0", "1", "2"):
            return int(answer)
        if answer == "q":
            return None


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.preference import infer_weights, read_pairs, reward_differences

    for name in ("questions", "prompts"):
        if config[name] < 1:
            raise ConfigError(f"{name} is {config[name]}, expected ≥ 1.", f"{name}=10 is a good number.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    folders = checkpoint_folders(config.checkpoint)
    critic = load_critic(folders)
    add_known_objectives(config, folders, critic.objectives)
    objectives = build_objectives(config, critic.objectives)
    check_same_objectives(objectives, folders)
    if config.pairs is None:
        pairs = _ask(config, critic, objectives, folder)
        if not pairs:
            print("No question was answered, so there are no weights yet; rerun the command to resume.")
            return
    else:
        pairs = read_pairs(config.pairs)
        if not pairs:
            raise DataError(f"pairs is {config.pairs!r}, a file without any pair.", "add at least one choice.")
    inferred = infer_weights(reward_differences(pairs, objectives, critic), critic.objectives)
    write_json(folder / "weights.json", inferred.to_json())
    _print_weights(inferred)
    weights = inferred.normalised()
    if critic.conditioned and min(weights.values()) < 0:
        print(
            "This critic is conditioned and takes weights ≥ 0 only: negative weights are 0 in the command below. "
            "To train a critic for all weights, use improvement=independent."
        )
        weights = {name: max(weight, 0.0) for name, weight in weights.items()}
    shown = ", ".join(f"{name}: {weight:.3g}" for name, weight in weights.items())
    shared = [override for override in HydraConfig.get().overrides.task if override.startswith(_SHARED_OVERRIDES)]
    quoted = [literal_override("checkpoint", folder).partition("=")[2] for folder in folders]
    checkpoint = quoted[0] if len(quoted) == 1 else f"[{','.join(quoted)}]"
    command = ["mavis", "generate", f"checkpoint={checkpoint}", *shared, f"weights={{{shown}}}"]
    print(f"\n{folder / 'weights.json'}\n\ntry next:\n  {shlex.join([*command, f'prompt={pairs[0].prompt}'])}")


def _print_weights(inferred: InferredWeights) -> None:
    normalised = inferred.normalised()
    print_table(
        f"weights from {inferred.pairs} choices",
        [
            {
                "objective": name,
                "weight": weight,
                "95 % from": inferred.low[name],
                "to": inferred.high[name],
                "normalised": normalised[name],
            }
            for name, weight in inferred.weights.items()
        ],
    )
    print("Weights are in logits per standard deviation of reward; the magnitudes of normalised ones sum to one.")
    if inferred.undetermined:
        print(f"No pair differs on {', '.join(inferred.undetermined)}, so the choices say nothing about it.")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("elicit")(_run)()


if __name__ == "__main__":
    main()
