"""How close to the optimal frontier does each critic come, and what does it cost? Trains and evaluates several seeds.

    python benchmarks/bench_frontier.py --policy embedded FOLDER_OR_HUB_ID [--methods paper hidden memory best]

Every cell (policy, method, seed) trains a critic and sweeps β on held-out prompts, in a process of its own with one
thread. Each seed has its own training, sweep and estimate of the optimal frontier, so the spread over seeds is that of
the whole experiment; the methods share the random numbers of a seed. Best-of-n sampling from the reference policy, at n
times the cost, is included for comparison. Speeds are measured at the end, interleaved. An interrupted run resumes when
rerun.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from lib import results
from lib.frontier_methods import METHODS, OBJECTIVES, PROMPTS, SOURCES, TARGETS, WEIGHTS, load, training_prompts
from transformers.utils import logging

from mavis import HiddenStateCritic, MavisTilt
from mavis.critics import Critic, ValueModelCritic
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.evaluation.efficiency import efficiency_at
from mavis.evaluation.speed import compare_speed
from mavis.evaluation.sweep_rollouts import reference_rollouts, truncated_rollouts
from mavis.math.best_of_n import best_of_n
from mavis.rollouts import RolloutSettings
from mavis.training import FitSettings, ImprovementSettings, improve
from mavis.utils.files import write_json

NO_TILT = 1e-3
"""The first β of a sweep with truncation: the truncated reference policy itself."""
REPORTED_N = (2, 4, 8, 16)
MEASURED_N = (1, *REPORTED_N, 32, 64, 128, 256)


def recorded_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings to record: policies by name, with their source instead of a local path."""
    policies = {Path(policy).name: SOURCES.get(Path(policy).name, policy) for policy in arguments.policy}
    return {name: value for name, value in vars(arguments).items() if name != "policy"} | {"policies": policies}


def sweep_seed(seed: int) -> int:
    """Derive the sampling seed of an evaluation, so that seeds do not share random numbers."""
    return 77 + 1000 * seed


def evaluation(seed: int, top_k: int | None, arguments: argparse.Namespace) -> EvaluationSettings:
    """Configure the sweep of a method with K = `top_k` candidates."""
    return EvaluationSettings(
        divisions=2,
        betas=(*(() if top_k is None else (NO_TILT,)), 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
        samples=arguments.samples,
        reference_samples=arguments.reference_samples,
        target_kls=TARGETS,
        speed_repeats=0,
        sampling=RolloutSettings(max_new_tokens=64, top_k=top_k, shard_size=512, seed=sweep_seed(seed)),
    )


def reference(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Sample the reference rollouts that all methods of a policy and seed share."""
    torch.set_num_threads(1)
    policy, tokenizer = load(name)
    reference_rewards(name, policy, tokenizer, seed, arguments)


def reference_rewards(name: str, policy: Any, tokenizer: Any, seed: int, arguments: argparse.Namespace) -> torch.Tensor:
    """Return the raw rewards (P, N, M) of the reference rollouts, sampled once."""
    settings, folder = evaluation(seed, None, arguments), reference_folder(name, seed, arguments)
    rewards, _ = rewards_and_kl(reference_rollouts(policy, tokenizer, OBJECTIVES, PROMPTS, folder, settings))
    return rewards.view(len(PROMPTS), arguments.reference_samples, len(OBJECTIVES))


def rewards_and_kl(shards: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the raw rewards (N, M) and the KL (N,) of all responses in some shards."""
    rewards, kl = [], []
    for shard in shards:
        rewards.append(torch.tensor(shard["rewards"][:], dtype=torch.float64))
        kl.append(torch.tensor([sum(steps) for steps in shard["kl"][:]], dtype=torch.float64))
    return torch.cat(rewards), torch.cat(kl)


def truncation_kl(name: str, method: str, seed: int, arguments: argparse.Namespace) -> float:
    """Measure the KL of a method's truncation to its candidates alone, in nats per response."""
    torch.set_num_threads(1)
    policy, tokenizer = load(name)
    settings = evaluation(seed, METHODS[method]["top_k"], arguments)
    folder = cell_folder(name, method, seed, arguments) / "evaluation"
    _, kl = rewards_and_kl(truncated_rollouts(policy, tokenizer, OBJECTIVES, PROMPTS, folder, settings))
    return float(kl.mean())


def cell(name: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one critic and evaluate it; return the seconds of training, the efficiencies and those of best-of-n."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    policy, tokenizer = load(name)
    seconds = None if "iterations_of" in METHODS[method] else train(name, method, seed, policy, tokenizer, arguments)
    critic = Critic.from_pretrained(critic_folder(name, method, seed, arguments))
    entries, best = measure(name, method, seed, policy, tokenizer, critic, arguments)
    print(name, method, seed, *(f"{e['efficiency']:.3f}" if e["efficiency"] else "–" for e in entries), flush=True)
    return {"seconds": seconds, "entries": entries, "best_of_n": best}


def train(name: str, method: str, seed: int, policy: Any, tokenizer: Any, arguments: argparse.Namespace) -> float:
    """Train one critic and return the processor time in seconds, without work repeated after an interruption."""
    method_settings = METHODS[method]
    folder = cell_folder(name, method, seed, arguments)
    settings = ImprovementSettings(
        beta=3.0,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=64, top_k=method_settings["top_k"], shard_size=512, seed=seed),
        fit=FitSettings(**method_settings["fit"]),
        **method_settings["improvement"],
    )
    kind: Any = ValueModelCritic if "readout" in method_settings["critic"] else HiddenStateCritic
    critic = kind.for_policy(
        policy, list(OBJECTIVES), composition=settings.composition, seed=seed, **method_settings["critic"]
    )
    seconds_file = folder / "seconds.json"
    spent = json.loads(seconds_file.read_text()) if seconds_file.is_file() else 0.0
    counted = time.process_time()

    def save_seconds() -> None:
        nonlocal spent, counted
        now = time.process_time()
        spent, counted = spent + now - counted, now
        write_json(seconds_file, spent)

    def on_progress(stage: str, *_: int) -> None:
        if stage.endswith("rollouts"):  # rollouts survive an interruption, while a fit restarts
            save_seconds()

    for _ in improve(
        policy, tokenizer, critic, OBJECTIVES, training_prompts(), folder / "train", settings, progress=on_progress
    ):
        save_seconds()
    return float(spent)


def measure(
    name: str, method: str, seed: int, policy: Any, tokenizer: Any, critic: Any, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sweep β with a trained critic.

    Returns:
        The efficiency by weights and KL, with the n for which best-of-n has the same reward; and the efficiency of
        best-of-n by weights and n.
    """
    settings = evaluation(seed, METHODS[method]["top_k"], arguments)
    folder, limit = cell_folder(name, method, seed, arguments), reference_folder(name, seed, arguments)
    report = evaluate(policy, tokenizer, critic, OBJECTIVES, PROMPTS, folder / "evaluation", settings, reference=limit)
    assert report is not None  # one process
    rewards = critic.normalise(reference_rewards(name, policy, tokenizer, seed, arguments))
    entries, best = [], []
    for entry in report.efficiency:
        weights = list(entry.weights.values())
        weighted = rewards @ torch.tensor(weights, dtype=torch.float64)
        if entry.kl == TARGETS[0]:  # once per choice of weights
            of_n = {n: best_of_n(weighted, n) for n in MEASURED_N}
            best += [
                {"n": n, "weights": weights, "kl": of_n[n][1], "efficiency": efficiency_at(weighted, *of_n[n])}
                for n in REPORTED_N
            ]
        matched = equivalent_n({n: reward for n, (reward, _) in of_n.items()}, entry.reward)
        entries.append(asdict(entry) | {"weights": weights, "equivalent_n": matched})
    return entries, best


def reference_folder(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of the reference rollouts of a policy and seed."""
    return Path(arguments.folder) / Path(name).name / f"limit-{seed}"


def cell_folder(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of a cell."""
    return Path(arguments.folder) / Path(name).name / f"{method}-{seed}"


def critic_folder(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Return the folder of a cell's critic: the final one, or another method's after some iterations."""
    if "iterations_of" not in METHODS[method]:
        return cell_folder(name, method, seed, arguments) / "train" / "critic"
    other, iterations = METHODS[method]["iterations_of"]
    return cell_folder(name, other, seed, arguments) / "train" / f"iteration-{iterations - 1}" / "critic"


def decode_ratios(name: str, methods: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Compare the speed of tilted decoding, with the first critic of every method, with plain decoding."""
    policy, tokenizer = load(name)
    inputs = tokenizer([PROMPTS[0]] * 8, return_tensors="pt")
    critics = {
        method: Critic.from_pretrained(critic_folder(name, method, arguments.seeds[0], arguments)) for method in methods
    }

    def detach_all() -> None:
        for critic in critics.values():
            critic.detach()

    setups: dict[str, Any] = {"plain": detach_all}
    for method, critic in critics.items():

        def make(critic: Critic = critic, top_k: int | None = METHODS[method]["top_k"]) -> MavisTilt:
            detach_all()  # so that the hooks of idle critics cost nothing
            critic.attach(policy)
            return MavisTilt([0.5, 0.5], critic, beta=2.0, top_k=top_k)

        setups[method] = make
    speeds = compare_speed(policy, inputs, setups, new_tokens=64, repeats=15)
    detach_all()
    return {method: speeds[method]["ratio"] for method in critics}


def rows_of(
    policy: str, method: str, cells: list[dict[str, Any]], truncation_kl: float, decode_ratio: float | None
) -> list[dict[str, Any]]:
    """Aggregate the seeds of one policy and method into a row per weights and KL; without cells the rows are empty."""
    empty = [{"weights": w, "kl": kl, "efficiency": None, "equivalent_n": None} for w in WEIGHTS for kl in TARGETS]
    seconds = [cell["seconds"] for cell in cells if cell["seconds"] is not None]
    found = [cell["entries"] for cell in cells] or [empty]
    return [
        {
            "policy": Path(policy).name,
            "method": method,
            "critic": "value_model" if "readout" in METHODS[method]["critic"] else "hidden_state",
            "weights": entries[0]["weights"],
            "kl": entries[0]["kl"],
            **spread("efficiency", [entry["efficiency"] for entry in entries]),
            **spread("equivalent_n", [entry["equivalent_n"] for entry in entries]),
            "truncation_kl": round(truncation_kl, 4),
            "seeds": len(cells),
            "train_seconds": round(median(seconds)) if seconds else None,
            "decode_ratio": round(decode_ratio, 3) if decode_ratio else None,
        }
        for entries in zip(*found, strict=True)
    ]


def best_of_n_rows(policy: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how close best-of-n comes at its own KL; it needs no training, but n responses for one."""
    return [
        {
            "policy": Path(policy).name,
            "method": f"best_of_{entries[0]['n']}",
            "critic": None,
            "weights": entries[0]["weights"],
            "kl": round(mean(entry["kl"] for entry in entries), 4),
            **spread("efficiency", [entry["efficiency"] for entry in entries]),
            "seeds": len(entries),
            "train_seconds": 0,
            "decode_ratio": 1 / entries[0]["n"],
        }
        for entries in zip(*(cell["best_of_n"] for cell in cells), strict=True)
    ]


def equivalent_n(rewards: dict[int, float], reward: float | None) -> float | None:
    """Interpolate the n for which best-of-n has a given expected reward.

    Args:
        rewards: expected reward of best-of-n, by n in increasing order.
        reward: to be matched; None if unknown.

    Returns:
        n, interpolated in log n; None if the reward is unknown or outside the measured range.
    """
    known = list(rewards.values())
    if reward is None or not known[0] <= reward <= known[-1]:
        return None
    return float(np.exp(np.interp(reward, known, np.log(list(rewards)))))


def spread(name: str, found: list[float | None]) -> dict[str, float | None]:
    """Return the mean and standard deviation over seeds, None if the value of any seed is unknown."""
    known = [value for value in found if value is not None]
    complete = len(known) == len(found)
    return {
        name: round(mean(known), 4) if complete else None,
        f"{name}_std": round(stdev(known), 4) if complete and len(known) > 1 else None,
    }


def trained_methods(policy: str, methods: list[str], truncation_kls: dict[tuple[str, str], float]) -> list[str]:
    """Select the methods to train: one whose truncation alone costs more KL than any target gives way to its stand-in.

    Raises:
        SystemExit: if none remains.
    """
    hopeless = {method for method in METHODS if truncation_kls.get((policy, method), 0.0) > max(TARGETS)}
    chosen = [
        method
        for method in methods
        if method not in hopeless and METHODS[method].get("stands_in_for", method) in {method, *hopeless}
    ]
    if not chosen:
        raise SystemExit(f"no method of {', '.join(methods)} can be trained for {policy}")
    return chosen


def main() -> None:
    """Run the benchmark and write `results/frontier.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["embedded"], help="embedded, folders or hub ids")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt, weights and β")
    parser.add_argument(
        "--reference-samples", type=int, default=4096, help="reference responses per prompt, for the optimal frontier"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/frontier")
    parser.add_argument("--name", default="frontier", help="name of the result file")
    arguments = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        references = [pool.submit(reference, p, seed, arguments) for seed in arguments.seeds for p in arguments.policy]
        for future in references:
            future.result()
        futures = {
            (policy, method): [pool.submit(truncation_kl, policy, method, seed, arguments) for seed in arguments.seeds]
            for policy in arguments.policy
            for method, method_settings in METHODS.items()
            if method_settings["top_k"] is not None
        }
        truncation_kls = {key: mean(future.result() for future in found) for key, found in futures.items()}
        chosen = {policy: trained_methods(policy, arguments.methods, truncation_kls) for policy in arguments.policy}
        done: dict[tuple[str, str, int], dict[str, Any]] = {}
        for uses_other in (False, True):  # methods that reuse the training of another come last
            cells = {
                (policy, method, seed): pool.submit(cell, policy, method, seed, arguments)
                for method in arguments.methods
                for seed in arguments.seeds
                for policy in arguments.policy
                if method in chosen[policy] and ("iterations_of" in METHODS[method]) == uses_other
            }
            done |= {key: future.result() for key, future in cells.items()}
    for policy in arguments.policy:
        ratios = decode_ratios(policy, chosen[policy], arguments)
        rows += best_of_n_rows(policy, [done[policy, chosen[policy][-1], seed] for seed in arguments.seeds])
        for method in arguments.methods:
            truncation = truncation_kls.get((policy, method), 0.0)
            if method in chosen[policy]:
                found = [done[policy, method, seed] for seed in arguments.seeds]
                rows += rows_of(policy, method, found, truncation, ratios[method])
            elif (policy, method) in truncation_kls:
                rows += rows_of(policy, method, [], truncation, None)
    results.write(arguments.name, recorded_config(arguments) | {"methods": METHODS}, rows)


if __name__ == "__main__":
    main()
