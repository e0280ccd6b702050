"""`mavis demo`: the whole workflow on the embedded policy."""

from __future__ import annotations

import multiprocessing
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mavis.cli.build import (
    build_objectives,
    evaluation_settings,
    load_policy,
    plain,
    read_evaluation_prompts,
    read_prompts,
)
from mavis.cli.evaluate import evaluate
from mavis.cli.hydra_app import hydra_app, prepare_process
from mavis.cli.overrides import literal_override
from mavis.cli.train import train
from mavis.utils.files import write_json

if TYPE_CHECKING:
    from mavis.critics import Critic

_START = time.perf_counter()
_TARGET_KL = 2.0


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig

    from mavis.utils.locks import locked_folder

    folder = Path(HydraConfig.get().runtime.output_dir)
    with locked_folder(folder):
        _run_in(folder, config)


def _run_in(folder: Path, config: Any) -> None:
    """Train, evaluate and use a critic in a folder that no other run is using."""
    from hydra.core.hydra_config import HydraConfig

    from mavis.evaluation import write_report

    evaluation_settings(config)  # errors in the last step's settings are found before the first
    read_evaluation_prompts(config.data)
    # The reference rollouts need no critic, so a second core samples them during training. Whatever that process
    # leaves undone, should it die, the evaluation completes.
    sampling = multiprocessing.get_context("spawn").Process(
        target=_sample_reference, args=(plain(config), str(folder / "evaluation")), daemon=True
    )
    sampling.start()
    policy, tokenizer = load_policy(config.policy)
    critic = train(config, policy, tokenizer, folder)
    sampling.join()
    objectives = build_objectives(config, critic.objectives)
    report = evaluate(config, policy, tokenizer, critic, objectives, folder / "evaluation")
    assert report is not None  # there is one process

    critic.save_pretrained(folder / "critic")  # its model card now reports the efficiency
    paths = write_report(folder, report)
    print("\n" + "\n".join(str(path) for path in [folder / "critic", *paths]))
    policy_overrides = [one for one in HydraConfig.get().overrides.task if one.startswith("policy")]
    _print_continuations(config, policy, tokenizer, critic, policy_overrides)
    write_json(folder / "report.json", {"seconds": time.perf_counter() - _START} | report.to_json())


def _print_continuations(config: Any, policy: Any, tokenizer: Any, critic: Critic, policy_overrides: list[str]) -> None:
    """Continue one prompt under different weights, and print a command to try next."""
    import torch

    from mavis.decoding import respond

    first, last = critic.objectives[0], critic.objectives[-1]
    choices = [{first: 1.0}, {name: 1 / len(critic.objectives) for name in critic.objectives}, {last: 1.0}]
    next_weights = f"{{{last}: 0.7, {first}: 0.3}}"
    if first == last:
        choices, next_weights = [{first: 1.0}], f"{{{first}: 1}}"
        if not critic.conditioned:  # a conditioned critic was not trained on negative weights
            choices, next_weights = [*choices, {first: -1.0}], f"{{{first}: -1}}"
    strength = _strength(config, critic)
    shown = next(f"{name}={value:g}" for name, value in strength.items() if value is not None)
    under = f"{len(choices)} choices of weights, each" if len(choices) > 1 else "its only weight,"
    print(f"\n{config.story!r}, continued under {under} at {shown}:")
    for weights in choices:
        torch.manual_seed(config.seed)
        [[response]] = respond(
            policy, tokenizer, [config.story], critic=critic, weights=weights, **strength, **plain(config.decoding)
        )
        print(f"\n{weights}\n  {config.story}{response.text}")
    checkpoint = literal_override("checkpoint", f"{config.output}/critic")
    command = ["mavis", "generate", checkpoint, *policy_overrides, f"weights={next_weights}"]
    print("\ntry next:\n  " + shlex.join([*command, shown, "samples=3", f"prompt={config.story}"]))


def _strength(config: Any, critic: Critic) -> dict[str, Any]:
    """Choose the target KL that the demo shows, or less if the critic's calibration does not reach it."""
    reach = critic.calibration.max_kl() if critic.calibration is not None else 0.0
    target_kl = _TARGET_KL if reach >= _TARGET_KL else float(f"{0.99 * reach:.3g}")
    return {"beta": None, "target_kl": target_kl} if target_kl > 0 else {"beta": config.beta, "target_kl": None}


def _sample_reference(plain_config: dict[str, Any], folder: str) -> None:
    from omegaconf import OmegaConf

    from mavis.evaluation.sweep_rollouts import reference_rollouts

    config = OmegaConf.create(plain_config)
    prepare_process(config)
    policy, tokenizer = load_policy(config.policy)
    objectives, prompts = build_objectives(config), read_prompts(config.data.evaluation_prompts)
    for _ in reference_rollouts(policy, tokenizer, objectives, prompts, folder, evaluation_settings(config)):
        pass


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("demo")(_run)()


if __name__ == "__main__":
    main()
