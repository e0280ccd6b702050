"""Does J_w = reward − KL/β rise from round to round of training? Sampled under the critic that every round left.

    python benchmarks/bench_iterations.py --policy embedded FOLDER_OR_HUB_ID --folder outputs/frontier

It goes through the critics that `bench_frontier.py` left in its folder, all at one β and on its prompts, which were
never trained on, and says beside J which share of the gain J* − J_ref it is. Round 0 is the reference policy under the
method's own cut to candidates. A repeated call goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_frontier
import torch
from lib import results
from transformers.utils import logging

from mavis.critics import Critic
from mavis.math.frontier import optimal_frontier
from mavis.rollouts.collect import RolloutPlan, collect

WEIGHTS = torch.tensor(bench_frontier.WEIGHTS, dtype=torch.float64)
BETA = 3.0  # that which the independent critics were improved at
TRUSTED = 50.0  # effective samples below which the optimum is not known


def rounds_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one training, before its first round and after each; nothing if there was none."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    place = bench_frontier.place_of(name, method, seed, arguments)
    if not (place / "train" / "critic").is_dir():
        return []
    policy, tokenizer = bench_frontier.load(name)
    how = bench_frontier.METHODS[method]
    reference = bench_frontier.reference_rewards(name, policy, tokenizer, seed, arguments)
    sampling = replace(
        bench_frontier.evaluation(seed, how["top_k"], arguments).sampling, seed=bench_frontier.sweep_seed(seed) + 2
    )
    rounds = range(how["improvement"]["iterations"])
    critics = [Critic.from_pretrained(place / "train" / f"iteration-{i}" / "critic") for i in rounds]
    normalise = critics[0].normalise
    prompts = [prompt for prompt in bench_frontier.PROMPTS for _ in range(arguments.samples)]
    weights_of_rows = WEIGHTS.repeat_interleave(len(prompts), 0)
    plan = RolloutPlan(prompts * len(WEIGHTS), weights_of_rows, torch.full_like(weights_of_rows[:, 0], BETA))

    def sampled(done: int, critic: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw rewards (W, N, M), on the scale that the critics were trained on, and KL (W, N)."""
        if critic is None and how["top_k"] is None:  # the reference policy itself, which has been drawn
            rewards = normalise(reference).flatten(0, 1).expand(len(WEIGHTS), -1, -1)
            return rewards, rewards.new_zeros(rewards.shape[:2])
        shards = collect(
            policy,
            tokenizer,
            bench_frontier.OBJECTIVES,
            plan if critic else RolloutPlan.reference(plan.prompts, WEIGHTS.shape[1]),
            place / "rounds" / f"after-{done}",
            sampling,
            critic=critic,
            truncate_reference=True,  # a policy of another support is no start to compare with
        )
        raw, kl = bench_frontier.earned_and_spent(shards)
        return normalise(raw).view(len(WEIGHTS), -1, WEIGHTS.shape[1]), kl.view(len(WEIGHTS), -1)

    measured = [sampled(done, critic) for done, critic in enumerate([None, *critics])]
    rows = []
    for m, weights in enumerate(WEIGHTS):
        weighted = normalise(reference) @ weights
        optimum = optimal_frontier(weighted, torch.tensor([BETA], dtype=torch.float64))
        start, best = float(weighted.mean()), float(optimum.reward - optimum.kl / BETA)
        known = float(optimum.effective_sample_size) >= TRUSTED
        for done, (rewards, kl) in enumerate(measured):
            j = rewards[m] @ weights - kl[m] / BETA
            rows.append(
                {
                    "policy": Path(name).name,
                    "method": method,
                    "seed": seed,
                    "weights": weights.tolist(),
                    "rounds": done,
                    "j": round(float(j.mean()), 4),
                    "error": round(float(j.std()) / len(j) ** 0.5, 4),
                    "share": round((float(j.mean()) - start) / (best - start), 4) if known else None,
                }
            )
    print(Path(name).name, method, seed, *(f"{row['rounds']}:{row['j']:.3f}" for row in rows), flush=True)
    return rows


def main() -> None:
    """Measure every training and write `results/rounds.json`."""
    trained = [method for method, how in bench_frontier.METHODS.items() if "rounds_of" not in how]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["embedded"], help="embedded, folders or hub ids")
    parser.add_argument("--methods", nargs="+", default=trained, choices=trained)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=120, help="responses per prompt, weights and round")
    parser.add_argument("--reference-samples", type=int, default=4096, help="per prompt, as in bench_frontier.py")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/frontier", help="that of bench_frontier.py")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.processes) as pool:
        cells = [
            pool.submit(rounds_of, policy, method, seed, arguments)
            for policy in arguments.policy
            for method in arguments.methods
            for seed in arguments.seeds
        ]
        rows = [row for cell in cells for row in cell.result()]
    results.write("rounds", bench_frontier.told(arguments) | {"beta": BETA}, rows)


if __name__ == "__main__":
    main()
