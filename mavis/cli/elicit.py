"""`mavis elicit`: infer a user's preference weights from choices between two responses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from mavis.cli.app import (
    check_objectives_manifest,
    hydra_app,
    load_policy,
    make_objectives,
    read_prompts,
    sampling_settings,
    show_table,
)
from mavis.errors import ConfigError, DataError
from mavis.utils.files import write_json

_CHOICES = "1 or 2 for the one you prefer, 0 to skip, q to stop"
# Overrides of this command that `mavis generate` needs too, to decode as here.
_SHARED = ("policy", "decoding", "beta=", "target_kl=")


def _ask(config: Any, critic: Any, objectives: dict[str, Any], folder: Path) -> list[Any]:
    """Ask until there are as many answers as wanted; returns the pairs of this and of earlier calls."""
    import torch

    from mavis.preference import candidate_pairs, next_pair, reward_differences
    from mavis.preference.pairs import read_answers, write_answers

    path = folder / "answers.jsonl"
    answers = read_answers(path) if path.is_file() else []
    answered = torch.zeros(0, len(critic.objectives), dtype=torch.float64)
    if kept := [pair for pair, is_skipped in answers if not is_skipped]:
        answered = reward_differences(kept, objectives, critic)
    if len(answered) >= config.questions:
        return kept
    prompts = read_prompts(config.data.prompts)[: config.prompts]
    check_objectives_manifest(config, critic.objectives, folder)
    policy, tokenizer = load_policy(config.policy)
    print(f"getting responses to {len(prompts)} prompts ...", flush=True)
    pool = candidate_pairs(
        policy,
        tokenizer,
        critic,
        objectives,
        prompts,
        folder / "responses",
        sampling_settings(config, config.shard_size, critic),
        beta=config.beta,
        target_kl=config.target_kl,
        divisions=config.divisions,
    )
    known = {pair for pair, _ in answers}
    asked = {i for i, pair in enumerate(pool.pairs) if pair in known or pair.swapped() in known}
    while len(answered) < config.questions and len(asked) < len(pool.pairs):
        index = next_pair(pool.differences, answered, asked)
        pair, difference = pool.pairs[index], pool.differences[index : index + 1]
        print(f"\n=== question {len(answered) + 1} of {config.questions}")
        choice = _choice(pair)
        if choice is None:
            break
        asked.add(index)
        if choice == 2:
            pair, difference = pair.swapped(), -difference
        if choice:
            answered = torch.cat([answered, difference])
        answers.append((pair, choice == 0))
        write_answers(path, answers)
    else:
        if len(answered) < config.questions:
            print(f"\nThere is no other pair to ask about; prompts={2 * config.prompts} samples more in a new output.")
    return [pair for pair, is_skipped in answers if not is_skipped]


def _choice(pair: Any) -> int | None:
    """Show two responses and read which one is preferred; 0 for neither, None to stop."""
    for number, response in enumerate((pair.chosen, pair.rejected), 1):
        print(f"--- {number}\n{pair.prompt}{response}")
    while True:
        try:
            said = input(f"--- {_CHOICES}: ").strip().lower()
        except EOFError:
            print()
            return None
        if said in ("0", "1", "2"):
            return int(said)
        if said == "q":
            return None


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.critics import Critic
    from mavis.preference import infer_weights, read_pairs, reward_differences

    for name in ("questions", "prompts"):
        if config[name] < 1:
            raise ConfigError(f"{name} is {config[name]}, expected ≥ 1.", f"{name}=10 is a good number.")
    folder = Path(HydraConfig.get().runtime.output_dir)
    critic = Critic.from_pretrained(config.checkpoint)
    objectives = make_objectives(config, critic.objectives)
    if config.pairs is None:
        pairs = _ask(config, critic, objectives, folder)
        if not pairs:
            print("No question was answered, so there are no weights yet; repeat the command to go on.")
            return
    else:
        pairs = read_pairs(config.pairs)
        if not pairs:
            raise DataError(f"pairs come from {config.pairs!r}, which holds no pair.", "give at least one choice.")
    inferred = infer_weights(reward_differences(pairs, objectives, critic), critic.objectives)
    normalised = inferred.normalised()
    write_json(folder / "weights.json", inferred.to_json())
    show_table(
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
    print("in logits per standard deviation of reward; normalised, their sizes sum to one")
    if inferred.untold:
        print(f"No pair differs on {', '.join(inferred.untold)}: of that nothing is known yet.")
    if critic.conditioned and min(normalised.values()) < 0:
        print("This critic knows weights ≥ 0 alone: those below are left out of the command. improvement=independent")
        print("trains one for all weights.")
        normalised = {name: max(weight, 0.0) for name, weight in normalised.items()}
    shown = ", ".join(f"{name}: {weight:.3g}" for name, weight in normalised.items())
    shared = [override for override in HydraConfig.get().overrides.task if override.startswith(_SHARED)]
    command = ["mavis", "generate", f"checkpoint={config.checkpoint}", *shared, f"weights={{{shown}}}"]
    print(f"\n{folder / 'weights.json'}\n\ntry next:\n  {shlex.join([*command, f'prompt={pairs[0].prompt}'])}")


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("elicit")(_run)()


if __name__ == "__main__":
    main()
