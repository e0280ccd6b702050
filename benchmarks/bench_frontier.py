"""How close to the optimal frontier does each critic come, at what price? Training and evaluation, once per seed.

    python benchmarks/bench_frontier.py --policy embedded FOLDER_OR_HUB_ID [--methods paper hidden memory best]

Every cell (policy, method, seed) trains a critic and sweeps β on prompts that were never trained on, in a process of
its own with one thread. Training is measured in processor time, which other work on the machine hardly changes. Beside
them stands the best of n reference responses, at n times the cost. Speeds are measured at the end, by turns. A repeated
call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import results
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mavis import HiddenStateCritic, MavisTilt, embedded
from mavis.critics import ValueModelCritic, load_critic
from mavis.critics.base import Critic
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.evaluation.evaluate import reference_rollouts
from mavis.evaluation.speed import compare_speed
from mavis.files import write_json
from mavis.math.frontier import frontier_efficiency
from mavis.rewards import Dialogue, Positive
from mavis.rollouts import RolloutSettings, load_prompts
from mavis.training import ImprovementSettings, improve
from mavis.training.fit import FitSettings

PROMPTS = [
    "Once upon a time",
    "One day, a little girl",
    "Tom and Jane were",
    "The old man looked at",
    "Lily wanted to",
]
OBJECTIVES = {"positive": Positive(), "dialogue": Dialogue()}
TARGETS = (0.5, 1.0, 2.0, 4.0)
METHODS: dict[str, dict[str, Any]] = {
    "paper": {
        "about": "separate trunk (a copy of the policy), every candidate of 40 read, plain returns, independent",
        "critic": {"readout": "candidates", "hidden": 0, "norm": False},
        "improvement": {"iterations": 2, "rollouts": 8_192, "reuse": False, "later_rate": 0.3},
        "fit": {"target": "monte_carlo", "epochs": 4},
        "top_k": 40,
    },
    "trunk": {
        "about": "the same trunk and returns with the token readout, which needs no cut to candidates",
        "critic": {"readout": "token", "rank": 16},
        "improvement": {"iterations": 2, "rollouts": 8_192, "reuse": False, "later_rate": 0.3},
        "fit": {"target": "monte_carlo", "epochs": 4},
        "top_k": None,
    },
    "hidden": {
        "about": "heads on the policy's own last state, return decomposition, independent composition",
        "critic": {"rank": 16},
        "improvement": {"iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "memory": {
        "about": "the same with a recurrent memory of the response",
        "critic": {"rank": 16, "memory": 128},
        "improvement": {"iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "best": {
        "about": "memory and the conditioned composition, one round more",
        "critic": {"rank": 16, "memory": 128},
        "improvement": {"composition": "conditioned", "iterations": 3, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "conditioned": {
        "about": "`best` after as many rounds as `memory`, which shows what the composition alone brings",
        "rounds_of": ("best", 2),
        "critic": {"rank": 16, "memory": 128},
        "top_k": None,
    },
}


def load(policy: str) -> tuple[Any, Any]:
    """Load a policy and its tokenizer."""
    if policy == "embedded":
        return embedded.load()
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


def training_prompts() -> list[str]:
    """First words of stories that begin like none of the evaluation prompts."""
    openings = load_prompts(str(embedded.path() / "openings.txt"))
    return [text for text in openings if not any(text.startswith(p) or p.startswith(text) for p in PROMPTS)]


def evaluation(arguments: argparse.Namespace) -> EvaluationSettings:
    """What is swept."""
    return EvaluationSettings(
        divisions=2,
        # The least shows what the cut to candidates alone costs. The largest lies beyond what `best` is trained for: at
        # 8 it spends less than 2 nats on `positive` alone with the embedded policy.
        betas=(1e-3, 1.0, 2.0, 4.0, 8.0, 12.0),
        samples=arguments.samples,
        reference_samples=arguments.reference_samples,
        target_kls=TARGETS,
        speed_repeats=0,
        sampling=RolloutSettings(max_new_tokens=64, top_k=None, shard_size=512, seed=77),
    )


def reference(name: str, arguments: argparse.Namespace) -> None:
    """Sample the reference rollouts that all cells of a policy share."""
    torch.set_num_threads(1)
    model, tokenizer = load(name)
    folder = Path(arguments.folder) / Path(name).name / "evaluation"
    for _ in reference_rollouts(model, tokenizer, OBJECTIVES, PROMPTS, folder, evaluation(arguments)):
        pass


def cell(name: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one critic and measure it; return what is known of it."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    policy, tokenizer = load(name)
    how = METHODS[method]
    place = place_of(name, method, seed, arguments)
    if "rounds_of" in how:  # trained by another cell
        critic = load_critic(critic_of(name, method, seed, arguments))
        return measure(name, method, seed, policy, tokenizer, critic, arguments) | {"seconds": None}
    settings = ImprovementSettings(
        beta=3.0,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=64, top_k=how["top_k"], shard_size=512, seed=seed),
        fit=FitSettings(**how["fit"]),
        **how["improvement"],
    )
    kind: Any = ValueModelCritic if "readout" in how["critic"] else HiddenStateCritic
    critic = kind.for_policy(policy, list(OBJECTIVES), composition=settings.composition, seed=seed, **how["critic"])
    seconds = place / "seconds.json"
    spent = json.loads(seconds.read_text()) if seconds.is_file() else 0.0
    counted = time.process_time()

    def count(*_: Any) -> None:
        nonlocal spent, counted
        now = time.process_time()
        spent, counted = spent + now - counted, now
        write_json(seconds, spent)

    prompts = training_prompts()
    for _ in improve(policy, tokenizer, critic, OBJECTIVES, prompts, place / "train", settings, progress=count):
        count()
    return measure(name, method, seed, policy, tokenizer, critic, arguments) | {"seconds": spent}


def measure(
    name: str, method: str, seed: int, policy: Any, tokenizer: Any, critic: Critic, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Sweep β under a critic that has been trained."""
    place = place_of(name, method, seed, arguments)
    shared, own = place.parent / "evaluation", place / "evaluation"
    measured = evaluation(arguments)
    measured = replace(measured, sampling=replace(measured.sampling, top_k=METHODS[method]["top_k"]))
    report = evaluate(policy, tokenizer, critic, OBJECTIVES, PROMPTS, own, measured, reference=shared)
    print(name, method, seed, *_shown(report["efficiency"]), flush=True)
    return {"efficiency": report["efficiency"], "limits": report["limits"]}


def place_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Say where a cell's files are."""
    return Path(arguments.folder) / Path(name).name / f"{method}-{seed}"


def critic_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Say where a cell's critic is: at the end of its own training, or after some rounds of another's."""
    if "rounds_of" not in METHODS[method]:
        return place_of(name, method, seed, arguments) / "train" / "critic"
    other, rounds = METHODS[method]["rounds_of"]
    return place_of(name, other, seed, arguments) / "train" / f"iteration-{rounds - 1}" / "critic"


def decode_ratios(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Time tilted decoding with every method's first critic against plain decoding."""
    policy, tokenizer = load(name)
    inputs = tokenizer([PROMPTS[0]] * 8, return_tensors="pt")
    critics = {
        method: load_critic(critic_of(name, method, arguments.seeds[0], arguments)) for method in arguments.methods
    }

    def detach_all() -> None:
        for critic in critics.values():
            critic.detach()

    ways: dict[str, Any] = {"plain": detach_all}
    for method, critic in critics.items():

        def make(critic: Critic = critic, top_k: int | None = METHODS[method]["top_k"]) -> MavisTilt:
            detach_all()  # an idle critic's hooks are no part of another's cost
            critic.attach(policy)
            return MavisTilt([0.5, 0.5], critic, beta=2.0, top_k=top_k)

        ways[method] = make
    speeds = compare_speed(policy, inputs, ways, new_tokens=64, repeats=15)
    detach_all()
    return {method: speeds[method]["ratio"] for method in critics}


def _shown(entries: list[dict[str, Any]]) -> list[str]:
    return [f"{e['efficiency']:.3f}" if e["efficiency"] is not None else "–" for e in entries]


def rows_of(policy: str, method: str, cells: list[dict[str, Any]], decode_ratio: float) -> list[dict[str, Any]]:
    """Gather the seeds of one policy and method, one row for each of the weights and KLs."""
    rows = []
    for entries in zip(*(cell["efficiency"] for cell in cells), strict=True):
        weights = list(entries[0]["weights"].values())
        limits = [limit for cell in cells for limit in cell["limits"] if list(limit["weights"].values()) == weights]
        rows.append(
            {
                "policy": Path(policy).name,
                "method": method,
                "critic": "value_model" if "readout" in METHODS[method]["critic"] else "hidden_state",
                "weights": weights,
                "kl": entries[0]["kl"],
                **spread("efficiency", [entry["efficiency"] for entry in entries]),
                **spread(
                    "as_best_of", [as_best_of(limit, e["reward"]) for limit, e in zip(limits, entries, strict=True)]
                ),
                "seeds": len(entries),
                "train_seconds": None if "rounds_of" in METHODS[method] else round(mean(c["seconds"] for c in cells)),
                "decode_ratio": round(decode_ratio, 3),
            }
        )
    return rows


def best_of_n_rows(policy: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how close the best of n comes at its own KL; it needs no training, and n responses for one."""
    rows = []
    for limits in zip(*(cell["limits"] for cell in cells), strict=True):
        for entries in zip(*(limit["best_of_n"] for limit in limits), strict=True):
            found = [
                frontier_efficiency(
                    entry["reward"], limit["reward"][0], np.interp(entry["kl"], limit["kl"], limit["reward"])
                )
                for limit, entry in zip(limits, entries, strict=True)
            ]
            rows.append(
                {
                    "policy": Path(policy).name,
                    "method": f"best_of_{entries[0]['n']}",
                    "critic": None,
                    "weights": list(limits[0]["weights"].values()),
                    "kl": round(mean(entry["kl"] for entry in entries), 4),
                    **spread("efficiency", found),
                    "seeds": len(found),
                    "train_seconds": 0,
                    "decode_ratio": 1 / entries[0]["n"],
                }
            )
    return rows


def as_best_of(limit: dict[str, Any], reward: float | None) -> float | None:
    """Find the n whose best response earns as much, between the n that were measured; None beyond them."""
    best = limit["best_of_n"]
    rewards = [limit["reward"][0], *(entry["reward"] for entry in best)]
    if reward is None or not rewards[0] <= reward <= rewards[-1]:
        return None
    return float(np.exp(np.interp(reward, rewards, np.log([1, *(entry["n"] for entry in best)]))))


def spread(name: str, found: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; None where a seed has no figure."""
    known = [value for value in found if value is not None]
    whole = len(known) == len(found)
    return {
        name: round(mean(known), 4) if whole else None,
        f"{name}_std": round(stdev(known), 4) if whole and len(known) > 1 else None,
    }


def main() -> None:
    """Run the benchmark and write `results/frontier.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["embedded"], help="embedded, folders or hub ids")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt, weights and β")
    parser.add_argument("--reference-samples", type=int, default=4096, help="per prompt, for the limit")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/frontier")
    parser.add_argument("--name", default="frontier", help="of the result file")
    arguments = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        list(pool.map(reference, arguments.policy, [arguments] * len(arguments.policy)))
        done: dict[tuple[str, str, int], dict[str, Any]] = {}
        for of_others in (False, True):  # those that others train come last
            waiting = {
                (policy, method, seed): pool.submit(cell, policy, method, seed, arguments)
                for method in arguments.methods
                for seed in arguments.seeds
                for policy in arguments.policy
                if ("rounds_of" in METHODS[method]) == of_others
            }
            done |= {key: future.result() for key, future in waiting.items()}
    for policy in arguments.policy:
        rows += best_of_n_rows(policy, [done[policy, arguments.methods[-1], seed] for seed in arguments.seeds])
        ratios = decode_ratios(policy, arguments)
        for method in arguments.methods:
            cells = [done[policy, method, seed] for seed in arguments.seeds]
            rows += rows_of(policy, method, cells, ratios[method])
    results.write(arguments.name, vars(arguments) | {"methods": METHODS}, rows)


if __name__ == "__main__":
    main()
