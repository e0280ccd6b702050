"""How much faster do two processes sample rollouts than one, with one thread each?

    python benchmarks/bench_processes.py

Each repeat starts one process, and then two with `accelerate launch`, which collect the same plan: sample, score and
write it shard by shard. The clock runs from when all processes are loaded and warmed up until all shards are on disk.
Medians over the repeats are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lib import results


def collect_once(arguments: argparse.Namespace) -> None:
    """Collect the plan in all processes of this job; the main process prints the number of rollouts and the seconds."""
    import torch

    from mavis.distributed import join_processes
    from mavis.policies import embedded
    from mavis.rewards import Dialogue, Objective, Positive
    from mavis.rollouts import RolloutPlan, RolloutSettings, collect

    torch.set_num_threads(1)
    policy, tokenizer = embedded.load()
    processes = join_processes("cpu")
    objectives: dict[str, Objective] = {"positive": Positive(), "dialogue": Dialogue()}
    settings = RolloutSettings(max_new_tokens=arguments.new_tokens, shard_size=arguments.shard_size)
    openings = (embedded.path() / "openings.txt").read_text(encoding="utf-8").splitlines()
    prompts = [openings[row % len(openings)] for row in range(arguments.rollouts)]

    def collected(name: str, prompts: list[str]) -> list[Any]:
        plan = RolloutPlan.reference(prompts, len(objectives))
        return list(collect(policy, tokenizer, objectives, plan, Path(arguments.folder) / name, settings))

    collected("warm", prompts[: arguments.shard_size * processes.world_size])
    processes.barrier()
    start = time.perf_counter()
    shards = collected("timed", prompts)
    seconds = time.perf_counter() - start
    if processes.is_main:
        tokens = sum(len(ids) for shard in shards for ids in shard["response_ids"])
        print(json.dumps({"rollouts": sum(map(len, shards)), "tokens": tokens, "seconds": seconds}), flush=True)


def measure(processes: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Launch a number of processes and return the rates that the main one reports."""
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]  # set explicitly to silence its warnings about defaults
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("rollouts", "shard_size", "new_tokens")
        given = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in sizes]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), __file__, "--folder", folder, *given],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {
        "rollouts_per_second": found["rollouts"] / found["seconds"],
        "tokens_per_second": found["tokens"] / found["seconds"],
        "seconds": found["seconds"],
        "seconds_with_start": time.perf_counter() - start,
    }


def main() -> None:
    """Run the benchmark and write `results/processes.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="repeats of one and two processes")
    parser.add_argument("--rollouts", type=int, default=2048)
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--name", default="processes", help="name of the result file")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # passed to the processes that this script launches
    arguments = parser.parse_args()
    if arguments.folder is not None:
        collect_once(arguments)
        return
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for repeat in range(arguments.repeats):
        for processes, rates in measured.items():
            rates.append(measure(processes, arguments))
            rate = rates[-1]["rollouts_per_second"]
            print(f"repeat {repeat}, processes {processes}: {rate:.1f} rollouts/s", file=sys.stderr, flush=True)
    medians = {n: {key: median(row[key] for row in found) for key in found[0]} for n, found in measured.items()}
    rows = [
        {
            "processes": n,
            "threads_each": 1,
            **{key: round(value, 3) for key, value in metrics.items()},
            "ratio": round(metrics["rollouts_per_second"] / medians[1]["rollouts_per_second"], 4),
            "repeats": [round(row["rollouts_per_second"], 3) for row in measured[n]],
        }
        for n, metrics in medians.items()
    ]
    print(f"two processes: {rows[1]['ratio']:.3f} × one", file=sys.stderr)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("folder", "name")}
    results.write(arguments.name, settings | {"policy": "embedded"}, rows)


if __name__ == "__main__":
    main()
