"""`mavis demo`: the main job from beginning to end on the embedded policy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mavis.cli.app import hydra_app, load_policy
from mavis.cli.evaluate import evaluate
from mavis.cli.generate import continuations
from mavis.cli.train import train


def _run(config: Any) -> None:
    import torch
    from hydra.core.hydra_config import HydraConfig

    from mavis.evaluation.report import write_report

    start = time.perf_counter()
    folder = Path(HydraConfig.get().runtime.output_dir)
    policy, tokenizer = load_policy(config.policy)
    critic = train(config, policy, tokenizer, folder)
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
        f"\ntry next:\n  mavis generate checkpoint={config.output}/critic decoding.top_k={config.decoding.top_k} "
        f"weights='{{{shown}}}' target_kl=2 samples=3 prompt='{config.story}'"
    )


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("demo")(_run)()


if __name__ == "__main__":
    main()
