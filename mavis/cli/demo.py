"""`mavis demo`: the main job from beginning to end on the embedded policy."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from mavis.cli.app import hydra_app, load_policy, make_objectives, prepare, read_prompts
from mavis.cli.evaluate import evaluate, evaluation_settings
from mavis.cli.generate import continuations
from mavis.cli.train import train


def _run(config: Any) -> None:
    import torch
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from mavis.evaluation.report import write_report

    start = time.perf_counter()
    folder = Path(HydraConfig.get().runtime.output_dir)
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

    first, last = critic.objectives[0], critic.objectives[-1]
    choices = [{first: 1.0}, {name: 1 / len(critic.objectives) for name in critic.objectives}, {last: 1.0}]
    print(f"\n{config.story!r}, continued under three weights, each at a KL of about 2 nats:")
    for weights in choices:
        torch.manual_seed(config.seed)
        told = continuations(
            policy, tokenizer, critic, [config.story], config.decoding, weights=weights, beta=None, target_kl=2.0
        )
        print(f"\n{weights}\n  {told[0]}")

    paths = write_report(folder, {"seconds": time.perf_counter() - start} | report)
    print("\n" + "\n".join(str(path) for path in [folder / "critic", *paths]))
    shown = ", ".join(f"{name}: {weight:g}" for name, weight in ((last, 1.0), (first, -0.5)))
    print(
        f"\ntry next:\n  mavis generate checkpoint={config.output}/critic "
        f"weights='{{{shown}}}' target_kl=2 samples=3 prompt='{config.story}'"
    )


def _draw_reference(plain_config: dict[str, Any], folder: str) -> None:
    from omegaconf import OmegaConf

    from mavis.evaluation.evaluate import reference_rollouts

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
