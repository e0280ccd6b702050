"""Does J_w = reward − KL/β rise from round to round of training? Sampled under the critic that every round left.

    python benchmarks/bench_rounds.py --policy embedded FOLDER_OR_HUB_ID --folder outputs/frontier

It goes through the critics that `bench_frontier.py` left in its folder, all at one β and on its prompts, which were
never trained on, and says beside J which share of the gain J* − J_ref it is. A repeated call goes on where it stopped.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_frontier
import results
import torch
from transformers.utils import logging

from mavis.critics import load_critic
from mavis.evaluation.evaluate import reference_rollouts
from mavis.math.frontier import optimal_frontier
from mavis.rollouts.collect import Plan, collect

WEIGHTS = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
BETA = 3.0  # that which the independent critics were improved at
TRUSTED = 50.0  # effective samples below which the optimum is not known


def rounds_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one training, before its first round and after each."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    policy, tokenizer = bench_frontier.load(name)
    place = bench_frontier.place_of(name, method, seed, arguments)
    settings = bench_frontier.evaluation(arguments)
    sampling = replace(
        settings.sampling, top_k=bench_frontier.METHODS[method]["top_k"], seed=settings.sampling.seed + 2
    )
    plan = Plan(
        [prompt for prompt in bench_frontier.PROMPTS for _ in range(arguments.samples)] * len(WEIGHTS),
        WEIGHTS.repeat_interleave(len(bench_frontier.PROMPTS) * arguments.samples, 0),
        torch.full((len(WEIGHTS) * len(bench_frontier.PROMPTS) * arguments.samples,), BETA, dtype=torch.float64),
    )
    draw = partial(collect, policy, tokenizer, bench_frontier.OBJECTIVES)
    rounds = bench_frontier.METHODS[method]["improvement"]["iterations"]
    critics = [load_critic(place / "train" / f"iteration-{done}" / "critic") for done in range(rounds)]

    def rewards(shards: list[Any]) -> torch.Tensor:
        raw = torch.cat([torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in shards])
        return critics[0].normalise(raw)

    shared = place.parent / "evaluation"
    reference = rewards(
        list(reference_rollouts(policy, tokenizer, bench_frontier.OBJECTIVES, bench_frontier.PROMPTS, shared, settings))
    ).view(len(bench_frontier.PROMPTS), -1, WEIGHTS.shape[1])
    measured = [(0, reference.flatten(0, 1)[None].expand(len(WEIGHTS), -1, -1), torch.zeros(len(WEIGHTS), 1))]
    for done, critic in enumerate(critics, start=1):
        shards = list(draw(plan, place / "rounds" / f"after-{done}", sampling, critic=critic))
        spent = torch.tensor([sum(kl) for shard in shards for kl in shard["kl"][:]], dtype=torch.float64)
        measured.append((done, rewards(shards).view(len(WEIGHTS), -1, WEIGHTS.shape[1]), spent.view(len(WEIGHTS), -1)))
    rows = []
    for m, weights in enumerate(WEIGHTS):
        optimum = optimal_frontier(reference @ weights, torch.tensor([BETA], dtype=torch.float64))
        best = float(optimum.reward - optimum.kl / BETA)
        start = float((reference @ weights).mean())
        for done, earned, kl in measured:
            goal = earned[m] @ weights - kl[m] / BETA
            rows.append(
                {
                    "policy": Path(name).name,
                    "method": method,
                    "seed": seed,
                    "weights": weights.tolist(),
                    "rounds": done,
                    "j": round(float(goal.mean()), 4),
                    "error": round(float(goal.std()) / len(goal) ** 0.5, 4),
                    "share": round((float(goal.mean()) - start) / (best - start), 4)
                    if float(optimum.effective_sample_size) >= TRUSTED
                    else None,
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
    parser.add_argument("--samples", type=int, default=200, help="responses per prompt, weights and round")
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
    results.write("rounds", vars(arguments) | {"beta": BETA}, rows)


if __name__ == "__main__":
    main()
