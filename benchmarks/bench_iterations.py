"""Does J_w = reward − KL/β rise with every iteration of training? Samples with the critic of each iteration.

    python benchmarks/bench_iterations.py --policy embedded FOLDER_OR_HUB_ID --folder outputs/frontier

It evaluates the critics in the folder of `bench_frontier.py`, at one β and on the same held-out prompts, and also
reports which share of the possible gain J* − J_ref is reached. Zero iterations stand for the reference policy,
truncated to the method's candidates. An interrupted run resumes when rerun.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_frontier
import torch
from lib import frontier_methods, results
from lib.frontier_methods import METHODS, OBJECTIVES, PROMPTS, load
from transformers.utils import logging

from mavis.critics import Critic
from mavis.math.frontier import optimal_frontier
from mavis.rollouts import RolloutPlan, collect

WEIGHTS = torch.tensor(frontier_methods.WEIGHTS, dtype=torch.float64)
BETA = 3.0
"""The β at which the independent critics were trained."""
MIN_EFFECTIVE_SAMPLES = 50.0
"""With fewer effective samples the optimum counts as unknown."""


def measure(name: str, method: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one training before its first iteration and after each; returns no rows if there was none."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = bench_frontier.cell_folder(name, method, seed, arguments)
    if not (folder / "train" / "critic").is_dir():
        return []
    policy, tokenizer = load(name)
    method_settings = METHODS[method]
    reference = bench_frontier.reference_rewards(name, policy, tokenizer, seed, arguments)
    sampling = replace(
        bench_frontier.evaluation(seed, method_settings["top_k"], arguments).sampling,
        seed=bench_frontier.sweep_seed(seed) + 2,
    )
    iterations = range(method_settings["improvement"]["iterations"])
    critics = [Critic.from_pretrained(folder / "train" / f"iteration-{i}" / "critic") for i in iterations]
    normalise = critics[0].normalise
    prompts = [prompt for prompt in PROMPTS for _ in range(arguments.samples)]
    weights_of_rows = WEIGHTS.repeat_interleave(len(prompts), 0)
    plan = RolloutPlan(prompts * len(WEIGHTS), weights_of_rows, torch.full_like(weights_of_rows[:, 0], BETA))

    def sampled(done: int, critic: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample and return normalised rewards (W, N, M) and KL (W, N)."""
        if critic is None and method_settings["top_k"] is None:  # the reference policy, already sampled
            rewards = normalise(reference).flatten(0, 1).expand(len(WEIGHTS), -1, -1)
            return rewards, rewards.new_zeros(rewards.shape[:2])
        shards = collect(
            policy,
            tokenizer,
            OBJECTIVES,
            plan if critic else RolloutPlan.reference(plan.prompts, WEIGHTS.shape[1]),
            folder / "iterations" / f"after-{done}",
            sampling,
            critic=critic,
            truncate_reference=True,  # iterations are compared with a reference of the same support
        )
        raw, kl = bench_frontier.rewards_and_kl(shards)
        return normalise(raw).view(len(WEIGHTS), -1, WEIGHTS.shape[1]), kl.view(len(WEIGHTS), -1)

    measured = [sampled(done, critic) for done, critic in enumerate([None, *critics])]
    rows = []
    for m, weights in enumerate(WEIGHTS):
        weighted = normalise(reference) @ weights
        optimum = optimal_frontier(weighted, torch.tensor([BETA], dtype=torch.float64))
        start, best = float(weighted.mean()), float(optimum.reward - optimum.kl / BETA)
        known = float(optimum.effective_sample_size) >= MIN_EFFECTIVE_SAMPLES
        for done, (rewards, kl) in enumerate(measured):
            j = rewards[m] @ weights - kl[m] / BETA
            rows.append(
                {
                    "policy": Path(name).name,
                    "method": method,
                    "seed": seed,
                    "weights": weights.tolist(),
                    "iterations": done,
                    "j": round(float(j.mean()), 4),
                    "error": round(float(j.std()) / len(j) ** 0.5, 4),
                    "share": round((float(j.mean()) - start) / (best - start), 4) if known else None,
                }
            )
    print(Path(name).name, method, seed, *(f"{row['iterations']}:{row['j']:.3f}" for row in rows), flush=True)
    return rows


def main() -> None:
    """Measure every training and write `results/iterations.json`."""
    trained = [method for method, how in METHODS.items() if "iterations_of" not in how]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["embedded"], help="embedded, folders or hub ids")
    parser.add_argument("--methods", nargs="+", default=trained, choices=trained)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=120, help="responses per prompt, weights and iteration")
    parser.add_argument("--reference-samples", type=int, default=4096, help="per prompt, as in bench_frontier.py")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/frontier", help="folder of bench_frontier.py")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.processes) as pool:
        cells = [
            pool.submit(measure, policy, method, seed, arguments)
            for policy in arguments.policy
            for method in arguments.methods
            for seed in arguments.seeds
        ]
        rows = [row for cell in cells for row in cell.result()]
    results.write("iterations", bench_frontier.recorded_config(arguments) | {"beta": BETA}, rows)


if __name__ == "__main__":
    main()
