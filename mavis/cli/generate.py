"""`mavis generate`: continue prompts under preference weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import build_objectives, checkpoint_folders, load_critic, load_policy, plain
from mavis.cli.console import print_note, terminal_text
from mavis.cli.hydra_app import hydra_app
from mavis.cli.known_objectives import add_known_objectives, check_same_objectives
from mavis.errors import ConfigError, MavisError

if TYPE_CHECKING:
    from mavis.critics import Critic
    from mavis.decoding import Response
    from mavis.policies import Prompt


def _check(config: Any) -> None:
    if config.format not in ("text", "json"):
        raise ConfigError(f"format is {config.format!r}, expected text or json.", "json prints one object a line.")
    if (config.prompt is None) == (config.prompt_file is None):
        raise ConfigError(
            f"prompt is {config.prompt!r} and prompt_file is {config.prompt_file!r}; expected exactly one of them.",
            "prompt_file=- reads standard input.",
        )
    if config.prompt_file not in (None, "-") and not Path(config.prompt_file).expanduser().is_file():
        raise ConfigError(  # otherwise the name would be looked up on the hub
            f"prompt_file is {config.prompt_file!r}, which does not exist.",
            "name a file with one prompt per line, or - for standard input.",
        )
    if config.samples < 1:
        raise ConfigError(f"samples is {config.samples}, expected ≥ 1.", "samples=3 continues each prompt three times.")
    if config.greedy and config.samples > 1:
        raise ConfigError(
            f"samples is {config.samples} and greedy is {config.greedy}, but greedy decoding gives one text.",
            "leave one of them out.",
        )


def _read_prompts(config: Any) -> list[Prompt]:
    from mavis.data import load_prompts

    shared = {"chat": config.chat, "system": config.system}
    if config.prompt is None:
        return load_prompts(config.prompt_file, repeated=True, **shared)
    if not str(config.prompt).strip():
        raise ConfigError("prompt is empty.", "give at least one word.")
    return load_prompts([str(config.prompt)], **shared)


def _with_vectors(policy: Any, coefficients: Any) -> AbstractContextManager[Any]:
    """Add alignment vectors to a policy's weights.

    Args:
        policy: the policy, which gets its own weights back at the end of the `with` block.
        coefficients: by the folder of each vector; None adds nothing.
    """
    if coefficients is None:
        return nullcontext()
    if not isinstance(coefficients, Mapping) or not coefficients:
        raise ConfigError(
            f"vectors is {coefficients!r}, expected a coefficient for each folder.",
            "e.g. vectors='{outputs/medical: 0.5}'.",
        )
    from mavis.vectors import Vectors

    by_folder = {str(folder): coefficient for folder, coefficient in coefficients.items()}
    return Vectors({folder: folder for folder in by_folder}).applied(policy, by_folder)


def _run(config: Any) -> None:
    from mavis.decoding import respond

    _check(config)
    prompts = _read_prompts(config)
    critic = load_critic(config.checkpoint)
    weights = plain(config.weights)
    if weights is None:
        weights = [1 / len(critic.objectives)] * len(critic.objectives)
    policy, tokenizer = load_policy(config.policy)
    with _with_vectors(policy, plain(config.vectors)):
        found = respond(
            policy,
            tokenizer,
            prompts,
            critic=critic,
            weights=weights,
            beta=config.beta,
            target_kl=config.target_kl,
            samples=config.samples,
            greedy=config.greedy,
            **plain(config.decoding),
        )
    if config.format == "json":
        _print_json(prompts, found, _rewards(config, critic, prompts, found))
    else:
        _print_texts(prompts, found)


def _rewards(
    config: Any, critic: Critic, prompts: Sequence[Prompt], found: Sequence[Sequence[Response]]
) -> list[dict[str, Any]]:
    """Score every response, sample by sample; without rewards if the critic's objectives are not known."""
    import torch

    from mavis.rewards import score

    is_asked = bool(config.get("objectives"))
    texts = [(prompt, response.text) for prompt, answers in zip(prompts, found, strict=True) for response in answers]
    try:
        folders = checkpoint_folders(config.checkpoint)
        add_known_objectives(config, folders, critic.objectives)
        objectives = build_objectives(config, critic.objectives)
        check_same_objectives(objectives, folders)
        raw = torch.from_numpy(score(objectives, *map(list, zip(*texts, strict=True))))
    except MavisError as error:
        if is_asked:
            raise
        print_note(f"no rewards: {error}")
        return [{}] * len(texts)
    names = critic.objectives
    return [
        {"rewards": dict(zip(names, row, strict=True)), "raw_rewards": dict(zip(names, raw_row, strict=True))}
        for row, raw_row in zip(critic.normalise(raw).tolist(), raw.tolist(), strict=True)
    ]


def _print_texts(prompts: Sequence[Prompt], found: Sequence[Sequence[Response]]) -> None:
    """Print continued texts with their prompts, and answers without."""
    single = len(found) == len(found[0]) == 1
    for number, (prompt, answers) in enumerate(zip(prompts, found, strict=True), start=1):
        for sample, response in enumerate(answers, start=1):
            if not single:  # texts can span lines, so each gets a heading
                print(f"--- prompt {number}, sample {sample}")
            print(terminal_text(f"{prompt}{response.text}" if isinstance(prompt, str) else response.text))


def _print_json(
    prompts: Sequence[Prompt], found: Sequence[Sequence[Response]], rewards: Sequence[dict[str, Any]]
) -> None:
    """Print one JSON object a line for each response."""
    scored = iter(rewards)
    for prompt, answers in zip(prompts, found, strict=True):
        for response in answers:
            row = {
                "prompt": prompt,
                "response": response.text,
                "finished": response.finished,
                **next(scored),
                "kl": round(response.spent, 6),
                "kl_per_token": [round(step, 6) for step in response.kl],
            }
            print(json.dumps(row, ensure_ascii=sys.stdout.isatty()))


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("generate")(_run)()


if __name__ == "__main__":
    main()
