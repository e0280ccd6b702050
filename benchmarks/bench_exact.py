"""How much of the optimum does each composition reach with exact values?

    python benchmarks/bench_exact.py

Every world is solved by dynamic programming for every choice of weights and β. Iteration 0 tilts by the values of the
reference policy.
"""

from __future__ import annotations

import argparse
from itertools import islice
from statistics import mean
from typing import Literal

import torch
from lib import results

from mavis.exact import WORLD_KINDS, World, normalised_gain, policy_iteration
from mavis.math.simplex import simplex_grid

COMPOSITIONS: tuple[Literal["independent", "conditioned"], ...] = ("independent", "conditioned")


def main() -> None:
    """Run the study and write `results/exact.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--betas", nargs="+", type=float, default=[2.0, 5.0, 10.0])
    parser.add_argument("--divisions", type=int, default=4, help="divisions of the grid of weights")
    parser.add_argument("--iterations", type=int, default=4, help="iterations after the first")
    parser.add_argument("--name", default="exact", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind in WORLD_KINDS:
        for seed in arguments.seeds:
            world = World.random(kind, seed)
            for beta in arguments.betas:
                for weights in simplex_grid(world.objectives, arguments.divisions):
                    for composition in COMPOSITIONS:
                        tilts = islice(policy_iteration(world, weights, beta, composition), arguments.iterations + 1)
                        rows += [
                            {
                                "kind": kind,
                                "seed": seed,
                                "beta": beta,
                                "weights": weights.tolist(),
                                "composition": composition,
                                "iteration": iteration,
                                "share": round(normalised_gain(world, tilt, beta * weights), 6),
                            }
                            for iteration, tilt in enumerate(tilts)
                        ]
        for composition in COMPOSITIONS:
            found = [
                [
                    row["share"]
                    for row in rows
                    if (row["kind"], row["composition"], row["iteration"]) == (kind, composition, i)
                ]
                for i in range(arguments.iterations + 1)
            ]
            print(
                kind,
                composition,
                " ".join(f"{mean(shares):.3f} (min {min(shares):.3f})" for shares in found),
                flush=True,
            )
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
