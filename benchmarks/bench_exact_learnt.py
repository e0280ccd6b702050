"""How much of the optimum do learnt value heads reach in an exactly solvable world?

    python benchmarks/bench_exact_learnt.py

`improve` trains a critic from sampled responses alone, and dynamic programming evaluates the tilted policy exactly. The
same composition with exact values is included for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from statistics import mean
from typing import Any

import torch
from lib import results

from mavis import HiddenStateCritic
from mavis.exact import World, WorldObjective, WorldPolicy, normalised_gain, policy_iteration, world_tokenizer
from mavis.rollouts import RolloutSettings
from mavis.training import FitSettings, ImprovementSettings, improve

WEIGHTS = [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
COMPOSITIONS = ("independent", "conditioned")


def train(composition: Any, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one critic and return its rows."""
    torch.set_num_threads(1)
    world = World.random(arguments.kind, arguments.world)
    policy, tokenizer = WorldPolicy.of(world), world_tokenizer(world)
    objectives = {name: WorldObjective(world, m) for m, name in enumerate(("first", "second"))}
    critic = HiddenStateCritic.for_policy(
        policy, list(objectives), hidden=arguments.hidden, rank=world.tokens, composition=composition, seed=seed
    )
    settings = ImprovementSettings(
        composition=composition,
        iterations=arguments.iterations + 1,
        rollouts=arguments.rollouts,
        beta=arguments.beta,
        **({"min_beta": 0.5, "max_beta": arguments.max_beta} if composition == "conditioned" else {}),
        later_rate=arguments.later_rate,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=world.steps, top_k=None, shard_size=1024, seed=seed),
        fit=FitSettings(epochs=arguments.epochs, learning_rate=arguments.learning_rate, weight_decay=0.0),
    )
    rows: list[dict[str, Any]] = []
    prompts = [f"t{token}" for token in range(world.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        for report in improve(policy, tokenizer, critic, objectives, prompts, folder, settings):
            for weights in WEIGHTS:
                lam = arguments.beta * torch.tensor(weights)
                reached = normalised_gain(world, policy.tilts(critic, lam), lam)
                rows.append(row(arguments, seed, weights, composition, report.iteration, reached, "hidden_state"))
            print(
                composition, seed, report.iteration, [round(r["share"], 3) for r in rows[-len(WEIGHTS) :]], flush=True
            )
    return rows


def row(
    arguments: argparse.Namespace,
    seed: int | None,
    weights: tuple[float, ...],
    composition: str,
    iteration: int,
    reached: float,
    critic: str,
) -> dict[str, Any]:
    """Build one row; `seed` is that of training, None for exact values."""
    return {
        "kind": arguments.kind,
        "world": arguments.world,
        "seed": seed,
        "beta": arguments.beta,
        "weights": list(weights),
        "composition": composition,
        "iteration": iteration,
        "share": round(reached, 6),
        "critic": critic,
    }


def main() -> None:
    """Run the study and write `results/exact-learnt.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="conflicting")
    parser.add_argument("--world", type=int, default=4, help="seed of the world")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of training")
    parser.add_argument("--compositions", nargs="+", default=list(COMPOSITIONS))
    parser.add_argument("--beta", type=float, default=5.0)
    parser.add_argument("--max-beta", type=float, default=8.0, help="largest β that conditioned training draws")
    parser.add_argument("--iterations", type=int, default=6, help="iterations after the first")
    parser.add_argument("--rollouts", type=int, default=4096, help="rollouts per iteration")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--later-rate", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default="exact-learnt", help="name of the result file")
    arguments = parser.parse_args()
    world, rows = World.random(arguments.kind, arguments.world), []
    for composition in arguments.compositions:
        for weights in WEIGHTS:
            w = torch.tensor(weights)
            for iteration, tilt in enumerate(
                islice(policy_iteration(world, w, arguments.beta, composition), arguments.iterations + 1)
            ):
                reached = normalised_gain(world, tilt, arguments.beta * w)
                rows.append(row(arguments, None, weights, composition, iteration, reached, "exact"))
    with ProcessPoolExecutor(arguments.processes) as pool:
        futures = [pool.submit(train, c, seed, arguments) for c in arguments.compositions for seed in arguments.seeds]
        for future in futures:
            rows += future.result()
    for critic in ("exact", "hidden_state"):
        for composition in arguments.compositions:
            last = [
                r["share"]
                for r in rows
                if (r["critic"], r["composition"], r["iteration"], r["weights"])
                == (critic, composition, arguments.iterations, [0.5, 0.5])
            ]
            print(f"{critic} {composition} at (½,½): {mean(last):.3f}, from {min(last):.3f} to {max(last):.3f}")
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
