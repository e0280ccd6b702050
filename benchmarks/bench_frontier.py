"""How close to the optimal frontier does each critic come, at what price? Training and evaluation, once per seed.

    python benchmarks/bench_frontier.py --policy embedded FOLDER_OR_HUB_ID [--methods paper hidden memory best]

Every cell (policy, method, seed) trains a critic and sweeps β on prompts that were never trained on, in a process of
its own with one thread. A seed has its own training, its own sweep and its own limit, so that the spread over seeds is
that of the whole experiment; methods share a seed's random numbers. Beside them stands the best of n reference
responses, at n times the cost. Speeds are measured at the end, by turns. A repeated call goes on where it stopped.
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
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mavis import HiddenStateCritic, MavisTilt, embedded
from mavis.critics import Critic, ValueModelCritic
from mavis.evaluation import EvaluationSettings, evaluate
from mavis.evaluation.efficiency import efficiency_at
from mavis.evaluation.speed import compare_speed
from mavis.evaluation.sweep_rollouts import reference_rollouts, truncated_rollouts
from mavis.math.best_of_n import best_of_n
from mavis.rewards import Dialogue, Positive
from mavis.rollouts import RolloutSettings, load_prompts
from mavis.training import ImprovementSettings, improve
from mavis.training.improvement.fit import FitSettings
from mavis.utils.files import write_json

PROMPTS = [
    "Once upon a time",
    "One day, a little girl",
    "Tom and Jane were",
    "The old man looked at",
    "Lily wanted to",
]
OBJECTIVES = {"positive": Positive(), "dialogue": Dialogue()}
TARGETS = (0.5, 1.0, 2.0, 4.0)
NO_TILT = 1e-3
"""A β with which a sweep begins that is cut to candidates."""
WEIGHTS = ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0])
PLAIN: dict[str, Any] = {
    "improvement": {
        "composition": "independent",
        "iterations": 2,
        "rollouts": 8_192,
        "reuse": False,
        "later_rate": 0.3,
    },
    "fit": {"target": "monte_carlo", "epochs": 4, "weight_decay": 0.01},
}
METHODS: dict[str, dict[str, Any]] = {
    "paper": {
        "about": "separate trunk (a copy of the policy), every candidate of 40 read, plain returns, independent",
        "critic": {"readout": "candidates", "hidden": 0, "norm": False},
        **PLAIN,
        "top_k": 40,
    },
    "trunk": {
        "about": "the same trunk and returns with the token readout, uncut, where the cut of `paper` costs too much",
        "stands_in_for": "paper",
        "critic": {"readout": "token", "rank": 16},
        **PLAIN,
        "top_k": None,
    },
    "hidden": {
        "about": "heads on the policy's own last state, return decomposition, independent composition",
        "critic": {"rank": 16},
        "improvement": {"composition": "independent", "iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
        "fit": {"epochs": 6, "weight_decay": 0.1},
        "top_k": None,
    },
    "memory": {
        "about": "the same with a recurrent memory of the response",
        "critic": {"rank": 16, "memory": 128},
        "improvement": {"composition": "independent", "iterations": 2, "rollouts": 16_384, "later_rate": 0.3},
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


SOURCES = {
    "embedded": "the project's own, made by bench_policy.py",
    "stories260K": "Karpathy's stories260K (llama2.c), from icppWorld/icpp_llm at 6c9bf2ee, llama2_c/stories260K",
}
SHOWN_N = (2, 4, 8, 16)
ASKED_N = (1, *SHOWN_N, 32, 64, 128, 256)


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


def told(arguments: argparse.Namespace) -> dict[str, Any]:
    """Say what a run was asked for: policies by their names, with where they come from."""
    policies = {Path(policy).name: SOURCES.get(Path(policy).name, policy) for policy in arguments.policy}
    return {name: value for name, value in vars(arguments).items() if name != "policy"} | {"policies": policies}


def sweep_seed(seed: int) -> int:
    """Keep what one seed draws for its evaluation apart from that of another."""
    return 77 + 1000 * seed


def evaluation(seed: int, top_k: int | None, arguments: argparse.Namespace) -> EvaluationSettings:
    """What is swept."""
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
    """Sample the reference rollouts that all cells of a policy and seed share."""
    torch.set_num_threads(1)
    policy, tokenizer = load(name)
    reference_rewards(name, policy, tokenizer, seed, arguments)


def reference_rewards(name: str, policy: Any, tokenizer: Any, seed: int, arguments: argparse.Namespace) -> torch.Tensor:
    """Draw them or read them back: raw rewards (P, N, M)."""
    settings, folder = evaluation(seed, None, arguments), limit_of(name, seed, arguments)
    rewards, _ = earned_and_spent(reference_rollouts(policy, tokenizer, OBJECTIVES, PROMPTS, folder, settings))
    return rewards.view(len(PROMPTS), arguments.reference_samples, len(OBJECTIVES))


def earned_and_spent(shards: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the raw rewards (N, M) and the KL (N,) of all responses in some shards."""
    rewards, kl = [], []
    for shard in shards:
        rewards.append(torch.tensor(shard["rewards"][:], dtype=torch.float64))
        kl.append(torch.tensor([sum(spent) for spent in shard["kl"][:]], dtype=torch.float64))
    return torch.cat(rewards), torch.cat(kl)


def cut_kl(name: str, method: str, seed: int, arguments: argparse.Namespace) -> float:
    """Measure what a method's cut to candidates costs alone, in nats per response."""
    torch.set_num_threads(1)
    policy, tokenizer = load(name)
    settings = evaluation(seed, METHODS[method]["top_k"], arguments)
    folder = place_of(name, method, seed, arguments) / "evaluation"
    _, kl = earned_and_spent(truncated_rollouts(policy, tokenizer, OBJECTIVES, PROMPTS, folder, settings))
    return float(kl.mean())


def cell(name: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one critic and measure it; return what is known of it."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    policy, tokenizer = load(name)
    seconds = None if "rounds_of" in METHODS[method] else train(name, method, seed, policy, tokenizer, arguments)
    critic = Critic.from_pretrained(critic_of(name, method, seed, arguments))
    entries, best = measure(name, method, seed, policy, tokenizer, critic, arguments)
    print(name, method, seed, *(f"{e['efficiency']:.3f}" if e["efficiency"] else "–" for e in entries), flush=True)
    return {"seconds": seconds, "entries": entries, "best_of_n": best}


def train(name: str, method: str, seed: int, policy: Any, tokenizer: Any, arguments: argparse.Namespace) -> float:
    """Train one critic and return the processor time that it took, without what a break made it do again."""
    how = METHODS[method]
    place = place_of(name, method, seed, arguments)
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

    def keep() -> None:
        nonlocal spent, counted
        now = time.process_time()
        spent, counted = spent + now - counted, now
        write_json(seconds, spent)

    def count(stage: str, *_: int) -> None:
        if stage.endswith("rollouts"):  # which are kept as they come, while a fit begins anew
            keep()

    for _ in improve(
        policy, tokenizer, critic, OBJECTIVES, training_prompts(), place / "train", settings, progress=count
    ):
        keep()
    return float(spent)


def measure(
    name: str, method: str, seed: int, policy: Any, tokenizer: Any, critic: Any, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sweep β under a critic that has been trained.

    Returns:
        What it reaches by weights and KL, with the n whose best response earns as much; and what the best of n reaches
        by weights and n.
    """
    settings, place = evaluation(seed, METHODS[method]["top_k"], arguments), place_of(name, method, seed, arguments)
    limit = limit_of(name, seed, arguments)
    report = evaluate(policy, tokenizer, critic, OBJECTIVES, PROMPTS, place / "evaluation", settings, reference=limit)
    assert report is not None  # one process
    rewards = critic.normalise(reference_rewards(name, policy, tokenizer, seed, arguments))
    entries, best = [], []
    for entry in report.efficiency:
        weights = list(entry.weights.values())
        weighted = rewards @ torch.tensor(weights, dtype=torch.float64)
        if entry.kl == TARGETS[0]:  # once for each choice of weights
            of_n = {n: best_of_n(weighted, n) for n in ASKED_N}
            best += [
                {"n": n, "weights": weights, "kl": of_n[n][1], "efficiency": efficiency_at(weighted, *of_n[n])}
                for n in SHOWN_N
            ]
        matched = as_best_of({n: reward for n, (reward, _) in of_n.items()}, entry.reward)
        entries.append(asdict(entry) | {"weights": weights, "as_best_of": matched})
    return entries, best


def limit_of(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Say where the reference rollouts of a policy and seed are."""
    return Path(arguments.folder) / Path(name).name / f"limit-{seed}"


def place_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Say where a cell's files are."""
    return Path(arguments.folder) / Path(name).name / f"{method}-{seed}"


def critic_of(name: str, method: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Say where a cell's critic is: at the end of its own training, or after some rounds of another's."""
    if "rounds_of" not in METHODS[method]:
        return place_of(name, method, seed, arguments) / "train" / "critic"
    other, rounds = METHODS[method]["rounds_of"]
    return place_of(name, other, seed, arguments) / "train" / f"iteration-{rounds - 1}" / "critic"


def decode_ratios(name: str, methods: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Time tilted decoding with every method's first critic against plain decoding."""
    policy, tokenizer = load(name)
    inputs = tokenizer([PROMPTS[0]] * 8, return_tensors="pt")
    critics = {
        method: Critic.from_pretrained(critic_of(name, method, arguments.seeds[0], arguments)) for method in methods
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


def rows_of(
    policy: str, method: str, cells: list[dict[str, Any]], cut: float, decode_ratio: float | None
) -> list[dict[str, Any]]:
    """Gather the seeds of one policy and method, one row for each of the weights and KLs; without cells, empty ones."""
    nothing = [{"weights": w, "kl": kl, "efficiency": None, "as_best_of": None} for w in WEIGHTS for kl in TARGETS]
    seconds = [cell["seconds"] for cell in cells if cell["seconds"] is not None]
    found = [cell["entries"] for cell in cells] or [nothing]
    return [
        {
            "policy": Path(policy).name,
            "method": method,
            "critic": "value_model" if "readout" in METHODS[method]["critic"] else "hidden_state",
            "weights": entries[0]["weights"],
            "kl": entries[0]["kl"],
            **spread("efficiency", [entry["efficiency"] for entry in entries]),
            **spread("as_best_of", [entry["as_best_of"] for entry in entries]),
            "cut_kl": round(cut, 4),
            "seeds": len(cells),
            "train_seconds": round(median(seconds)) if seconds else None,
            "decode_ratio": round(decode_ratio, 3) if decode_ratio else None,
        }
        for entries in zip(*found, strict=True)
    ]


def best_of_n_rows(policy: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say how close the best of n comes at its own KL; it needs no training, and n responses for one."""
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


def as_best_of(rewards: dict[int, float], reward: float | None) -> float | None:
    """Find the n whose best response earns as much, between the n that were measured.

    Args:
        rewards: what the best of n earns, by n in rising order.
        reward: what is earned.

    Returns:
        n, interpolated in its logarithm; None where nothing is reached, or something below or beyond all of them.
    """
    earned = list(rewards.values())
    if reward is None or not earned[0] <= reward <= earned[-1]:
        return None
    return float(np.exp(np.interp(reward, earned, np.log(list(rewards)))))


def spread(name: str, found: list[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds; None where a seed has no figure."""
    known = [value for value in found if value is not None]
    whole = len(known) == len(found)
    return {
        name: round(mean(known), 4) if whole else None,
        f"{name}_std": round(stdev(known), 4) if whole and len(known) > 1 else None,
    }


def compared(policy: str, methods: list[str], cuts: dict[tuple[str, str], float]) -> list[str]:
    """Say which methods are worth a training: those whose cut alone costs more than any target give way to stand-ins.

    Raises:
        SystemExit: if none is.
    """
    hopeless = {method for method in METHODS if cuts.get((policy, method), 0.0) > max(TARGETS)}
    chosen = [
        method
        for method in methods
        if method not in hopeless and METHODS[method].get("stands_in_for", method) in {method, *hopeless}
    ]
    if not chosen:
        raise SystemExit(f"{', '.join(methods)}: nothing that could be compared with {policy}")
    return chosen


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
        limits = [pool.submit(reference, p, seed, arguments) for seed in arguments.seeds for p in arguments.policy]
        for limit in limits:
            limit.result()
        waiting = {
            (policy, method): [pool.submit(cut_kl, policy, method, seed, arguments) for seed in arguments.seeds]
            for policy in arguments.policy
            for method, how in METHODS.items()
            if how["top_k"] is not None
        }
        cuts = {key: mean(cut.result() for cut in found) for key, found in waiting.items()}
        chosen = {policy: compared(policy, arguments.methods, cuts) for policy in arguments.policy}
        done: dict[tuple[str, str, int], dict[str, Any]] = {}
        for of_others in (False, True):  # those that others train come last
            cells = {
                (policy, method, seed): pool.submit(cell, policy, method, seed, arguments)
                for method in arguments.methods
                for seed in arguments.seeds
                for policy in arguments.policy
                if method in chosen[policy] and ("rounds_of" in METHODS[method]) == of_others
            }
            done |= {key: one.result() for key, one in cells.items()}
    for policy in arguments.policy:
        ratios = decode_ratios(policy, chosen[policy], arguments)
        rows += best_of_n_rows(policy, [done[policy, chosen[policy][-1], seed] for seed in arguments.seeds])
        for method in arguments.methods:
            cut = cuts.get((policy, method), 0.0)
            if method in chosen[policy]:
                found = [done[policy, method, seed] for seed in arguments.seeds]
                rows += rows_of(policy, method, found, cut, ratios[method])
            elif (policy, method) in cuts:
                rows += rows_of(policy, method, [], cut, None)
    results.write(arguments.name, told(arguments) | {"methods": METHODS}, rows)


if __name__ == "__main__":
    main()
