"""`mavis demo`: the main job from beginning to end on the embedded policy."""

from __future__ import annotations

import multiprocessing
import shlex
import time
from pathlib import Path
from typing import Any

from mavis.cli.app import hydra_app, load_policy, make_objectives, prepare, read_prompts
from mavis.cli.evaluate import evaluate, evaluation_settings, unseen_prompts
from mavis.cli.generate import continuations
from mavis.cli.train import train
from mavis.utils.files import write_json

_STARTED = time.perf_counter()


def _run(config: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mavis.evaluation import write_report

    folder = Path(HydraConfig.get().runtime.output_dir)
    evaluation_settings(config)  # a mistake in what is needed last is found first
    unseen_prompts(config.data)
    # The reference rollouts need no critic, so another core can draw them while this one trains. Should that process
    # die, its shards are taken up from where it stopped.
    helper = multiprocessing.get_context("spawn").Process(
        target=_draw_reference,
        args=(OmegaConf.to_container(config, resolve=True), str(folder / "evaluation")),
        daemon=True,
    )
    helper.start()
    policy, tokenizer = load_policy(config.policy)
    critic = train(config, policy, tokenizer, folder)
    helper.join()
    report = evaluate(config, policy, tokenizer, critic, folder / "evaluation")
    assert report is not None  # one process

    critic.save_pretrained(folder / "critic")  # its card now tells the efficiency
    paths = write_report(folder, report)
    print("\n" + "\n".join(str(path) for path in [folder / "critic", *paths]))
    _tell(config, policy, tokenizer, critic, [o for o in HydraConfig.get().overrides.task if o.startswith("policy")])
    write_json(folder / "report.json", {"seconds": time.perf_counter() - _STARTED} | report.to_json())


def _tell(config: Any, policy: Any, tokenizer: Any, critic: Any, policy_overrides: list[str]) -> None:
    """Continue one prompt under different weights, and say how to go on from here."""
    import torch

    first, last = critic.objectives[0], critic.objectives[-1]
    choices = [{first: 1.0}, {name: 1 / len(critic.objectives) for name in critic.objectives}, {last: 1.0}]
    next_weights = f"{{{last}: 0.7, {first}: 0.3}}"
    if first == last:
        choices, next_weights = [{first: 1.0}], f"{{{first}: 1}}"
        if not critic.conditioned:  # for which a negative weight lies outside what it has learnt
            choices, next_weights = [*choices, {first: -1.0}], f"{{{first}: -1}}"
    reached = critic.calibration.reach() if critic.calibration is not None else 0.0
    strength: dict[str, Any] = {"beta": None, "target_kl": 2.0}
    if reached < 2.0:  # a short training may not reach two nats, and none at all reaches nothing
        kl = float(f"{0.99 * reached:.3g}")
        strength = {"beta": None, "target_kl": kl} if kl > 0 else {"beta": config.beta, "target_kl": None}
    shown = next(f"{name}={value:g}" for name, value in strength.items() if value is not None)
    many = f"{len(choices)} choices of weights, each" if len(choices) > 1 else "its only weight,"
    print(f"\n{config.story!r}, continued under {many} at {shown}:")
    for weights in choices:
        torch.manual_seed(config.seed)
        told = continuations(policy, tokenizer, critic, [config.story], config.decoding, weights=weights, **strength)
        print(f"\n{weights}\n  {told[0]}")
    command = ["mavis", "generate", f"checkpoint={config.output}/critic", *policy_overrides, f"weights={next_weights}"]
    if critic.calibration is None:  # which would tell
        command.append(f"decoding.top_k={'null' if config.decoding.top_k is None else config.decoding.top_k}")
        command.append(f"decoding.temperature={config.decoding.temperature}")
    print("\ntry next:\n  " + shlex.join([*command, shown, "samples=3", f"prompt={config.story}"]))


def _draw_reference(plain_config: dict[str, Any], folder: str) -> None:
    from omegaconf import OmegaConf

    from mavis.evaluation.sweep_rollouts import reference_rollouts

    config = OmegaConf.create(plain_config)
    prepare(config)
    policy, tokenizer = load_policy(config.policy)
    objectives, prompts = make_objectives(config), read_prompts(config.data.evaluation_prompts)
    for _ in reference_rollouts(policy, tokenizer, objectives, prompts, folder, evaluation_settings(config)):
        pass


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("demo")(_run)()


if __name__ == "__main__":
    main()
