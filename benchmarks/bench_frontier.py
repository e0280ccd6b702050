"""How close to the optimal frontier does each critic come, at what price? Training and evaluation, once per seed.

    python benchmarks/bench_frontier.py --policy embedded FOLDER_OR_HUB_ID [--methods paper hidden memory best]

Every cell (policy, method, seed) trains a critic and sweeps β on prompts that were never trained on, in a process of
its own. A repeated call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import results
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mavis import HiddenStateCritic, embedded
from mavis.critics import ValueModelCritic
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.evaluation.evaluate import reference_rollouts
from mavis.files import write_json
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
        "about": "separate trunk (a copy of the policy), every candidate read, plain returns, independent composition",
        "critic": {"readout": "candidates", "hidden": 0},
        "improvement": {"iterations": 2, "reuse": False, "later_rate": 0.3},
        "fit": {"target": "monte_carlo", "epochs": 4},
        "top_k": 40,
    },
    "hidden": {
        "about": "heads on the policy's own last state, return decomposition, independent composition",
        "critic": {},
        "improvement": {"iterations": 2, "later_rate": 0.3},
        "fit": {"epochs": 8},
        "top_k": None,
    },
    "memory": {
        "about": "the same with a recurrent memory of the response",
        "critic": {"memory": 128},
        "improvement": {"iterations": 2, "later_rate": 0.3},
        "fit": {"epochs": 8},
        "top_k": None,
    },
    "best": {
        "about": "memory and the conditioned composition, earlier rollouts read again in every round",
        "critic": {"memory": 128},
        "improvement": {"composition": "conditioned", "iterations": 5, "later_rate": 0.3},
        "fit": {"epochs": 8, "weight_decay": 0.1},
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
        betas=(1.0, 2.0, 4.0, 7.0),
        samples=arguments.samples,
        reference_samples=arguments.reference_samples,
        target_kls=TARGETS,
        speed_batch=8,
        speed_repeats=5,
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
    place = Path(arguments.folder) / Path(name).name / f"{method}-{seed}"
    settings = ImprovementSettings(
        rollouts=arguments.rollouts,
        beta=3.0,
        calibration_samples=0,
        sampling=RolloutSettings(max_new_tokens=64, top_k=how["top_k"], shard_size=512, seed=seed),
        fit=FitSettings(**how["fit"]),
        **how["improvement"],
    )
    kind: Any = ValueModelCritic if "readout" in how["critic"] else HiddenStateCritic
    critic = kind.for_policy(policy, list(OBJECTIVES), composition=settings.composition, seed=seed, **how["critic"])
    seconds, goals = place / "seconds.json", []
    spent = json.loads(seconds.read_text()) if seconds.is_file() else []
    started = time.perf_counter()
    for report in improve(policy, tokenizer, critic, OBJECTIVES, training_prompts(), place / "train", settings):
        if report.iteration >= len(spent):
            spent.append(time.perf_counter() - started)
            write_json(seconds, spent)
        started = time.perf_counter()
        goals += [
            {"iteration": report.iteration, "goal": goal, "j": report.goal[goal], "error": report.goal_error[goal]}
            for goal in report.goal
        ]
    shared, own = Path(arguments.folder) / Path(name).name / "evaluation" / "reference", place / "evaluation"
    if not (own / "reference").exists():
        shutil.copytree(shared, own / "reference")
    measured = evaluation(arguments)
    measured = replace(measured, sampling=replace(measured.sampling, top_k=how["top_k"]))
    report = evaluate(policy, tokenizer, critic, OBJECTIVES, PROMPTS, own, measured)
    print(name, method, seed, f"{sum(spent):.0f} s", *_shown(report["efficiency"]), flush=True)
    return {
        "efficiency": report["efficiency"],
        "limits": [{"weights": limit["weights"], "best_of_n": limit["best_of_n"]} for limit in report["limits"]],
        "seconds": sum(spent),
        "decode_ratio": report["speed"]["tilted"]["ratio"],
        "goals": goals,
    }


def _shown(entries: list[dict[str, Any]]) -> list[str]:
    return [f"{e['efficiency']:.3f}" if e["efficiency"] is not None else "–" for e in entries]


def rows_of(policy: str, method: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gather the seeds of one policy and method."""
    rows = []
    for entries in zip(*(cell["efficiency"] for cell in cells), strict=True):
        found = [entry["efficiency"] for entry in entries]
        known = None not in found
        rows.append(
            {
                "policy": Path(policy).name,
                "method": method,
                "critic": "value_model" if "readout" in METHODS[method]["critic"] else "hidden_state",
                "weights": list(entries[0]["weights"].values()),
                "kl": entries[0]["kl"],
                "efficiency": round(mean(found), 4) if known else None,
                "efficiency_std": round(stdev(found), 4) if known and len(found) > 1 else None,
                "seeds": len(found),
                "train_seconds": round(mean(cell["seconds"] for cell in cells)),
                "decode_ratio": round(mean(cell["decode_ratio"] for cell in cells), 3),
            }
        )
    return rows


def main() -> None:
    """Run the benchmark and write `results/frontier.json` and `results/frontier-goals.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", default=["embedded"], help="embedded, folders or hub ids")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rollouts", type=int, default=8192, help="per iteration")
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt, weights and β")
    parser.add_argument("--reference-samples", type=int, default=4096, help="per prompt, for the limit")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/frontier")
    parser.add_argument("--name", default="frontier", help="of the result file")
    arguments = parser.parse_args()
    rows, goals = [], []
    with ProcessPoolExecutor(arguments.processes) as pool:
        list(pool.map(reference, arguments.policy, [arguments] * len(arguments.policy)))
        waiting = {
            (policy, method, seed): pool.submit(cell, policy, method, seed, arguments)
            for method in arguments.methods
            for seed in arguments.seeds
            for policy in arguments.policy
        }
        done = {key: future.result() for key, future in waiting.items()}
    for policy in arguments.policy:
        for method in arguments.methods:
            cells = [done[policy, method, seed] for seed in arguments.seeds]
            rows += rows_of(policy, method, cells)
            for seed, found in zip(arguments.seeds, cells, strict=True):
                goals += [
                    {"policy": Path(policy).name, "method": method, "seed": seed} | goal for goal in found["goals"]
                ]
    results.write(f"{arguments.name}-goals", vars(arguments), goals)
    results.write(arguments.name, vars(arguments) | {"methods": METHODS}, rows)


if __name__ == "__main__":
    main()
