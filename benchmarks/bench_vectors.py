"""What do alignment vectors do: by coefficient, in pairs, combined with a tilt, and on a model trained further?

    python benchmarks/bench_vectors.py

Each seed aligns copies of the embedded policy and trains critics, in a process of its own. Rewards are in standard
deviations of the embedded policy, and KL is measured to it, all on held-out prompts. An interrupted run resumes when
rerun.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lib import results
from lib.frontier_methods import OBJECTIVES, PROMPTS, training_prompts
from lib.peak_memory import peak_mib
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from mavis import HiddenStateCritic, embedded
from mavis.evaluation.efficiency import efficiency_at
from mavis.math.frontier import reward_at
from mavis.math.kl import step_kl
from mavis.rewards import Readability
from mavis.rollouts import RolloutPlan, RolloutSettings, collect
from mavis.rollouts.policy_kl import response_kl
from mavis.rollouts.replay import Sequences, forward_sequences
from mavis.training import AlignSettings, FitSettings, ImprovementSettings, align, improve
from mavis.utils.files import matches_manifest, write_json
from mavis.vectors import AlignmentVector, Vectors

LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
BETAS = (0.5, 1.0, 2.0, 4.0, 6.0, 9.0)
TARGETS = (0.5, 1.0, 2.0, 4.0)
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


class Lab:
    """The experiments of one seed: aligns the embedded policy, trains critics for it, and measures the results."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        self.seed, self.arguments = seed, arguments
        self.policy, self.tokenizer = embedded.load()
        self.untouched, _ = embedded.load()  # the reference for KL, while vectors are applied to `policy`
        self.folder = Path(arguments.folder) / f"seed-{seed}"
        self.prompts = training_prompts()
        self.settings = RolloutSettings(max_new_tokens=64, top_k=None, seed=seed)
        rewards, _ = self._sample(self.policy, "reference", arguments.reference_samples, None, 0.0)
        self.mean, self.std = rewards.mean(0), rewards.std(0)
        self.reference = ((rewards - self.mean) / self.std).view(len(PROMPTS), arguments.reference_samples, -1)

    def _sample(self, policy: Any, name: str, samples: int, critic: Any, beta: float) -> tuple[Tensor, list[Sequences]]:
        """Sample the evaluation prompts; return the raw rewards (N, M) and the sequences of each shard."""
        prompts = [prompt for prompt in PROMPTS for _ in range(samples)]
        plan = RolloutPlan.reference(prompts, len(OBJECTIVES))
        if critic is not None:
            plan = RolloutPlan(
                prompts, HALF.expand(len(prompts), -1), torch.full((len(prompts),), beta, dtype=torch.float64)
            )
        folder, settings = self.folder / "measured" / name, replace(self.settings, seed=1_000 + self.seed)
        shards = list(collect(policy, self.tokenizer, OBJECTIVES, plan, folder, settings, critic=critic))
        rewards = torch.cat([torch.tensor(shard["rewards"][:], dtype=torch.float64) for shard in shards])
        return rewards, [Sequences.pack(shard["prompt_ids"], shard["response_ids"]) for shard in shards]

    def measure(self, policy: Any, name: str, critic: Any = None, beta: float = 0.0) -> dict[str, Any]:
        """Return rewards with standard errors, and the KL to the embedded policy, exact at every step."""
        raw, shards = self._sample(policy, name, self.arguments.samples, critic, beta)
        rewards = (raw - self.mean) / self.std
        kl = torch.cat([self._kl(policy, sequences, critic, beta) for sequences in shards])
        return {
            "rewards": dict(zip(OBJECTIVES, rewards.mean(0).tolist(), strict=True)),
            "errors": dict(zip(OBJECTIVES, (rewards.std(0) / len(rewards) ** 0.5).tolist(), strict=True)),
            "reward": float((rewards @ HALF).mean()),
            "kl": float(kl.mean()),
        }

    @torch.no_grad()
    def _kl(self, policy: Any, sequences: Sequences, critic: Any, beta: float) -> Tensor:
        if critic is None:
            return response_kl(policy, self.untouched, sequences)
        (states, logits), (_, plain) = (forward_sequences(model, sequences) for model in (policy, self.untouched))
        kls = []
        for row in range(len(states)):  # row by row, to save memory
            inputs = critic.response_inputs(states[row : row + 1])[0]
            tilt = critic.tilt_from_inputs(inputs, None, (beta * HALF).float().expand(len(inputs), -1))
            steps = step_kl((logits[row] + tilt).log_softmax(-1), plain[row].log_softmax(-1))
            kls.append((steps * sequences.is_response[row]).double().sum())
        return torch.stack(kls)

    def aligned(self, name: str, objective: Any, policy: Any) -> Any:
        """Return a copy of a policy that is aligned to one objective."""
        settings = AlignSettings(seed=self.seed, evaluation_samples=64, steps=self.arguments.steps)
        report = align(
            policy, self.tokenizer, {name: objective}, {name: 1.0}, self.prompts, self.folder / name, settings
        )
        return AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32).eval().requires_grad_(False)

    def critic(self, name: str, policy: Any) -> HiddenStateCritic:
        """Train a critic for a policy."""
        settings = ImprovementSettings(
            composition="independent",
            iterations=2,
            rollouts=self.arguments.rollouts,
            beta=3.0,
            calibration_samples=0,
            sampling=self.settings,
            fit=FitSettings(weight_decay=0.1),
        )
        critic = HiddenStateCritic.for_policy(
            policy, list(OBJECTIVES), memory=64, rank=16, composition="independent", seed=self.seed
        )
        list(improve(policy, self.tokenizer, critic, OBJECTIVES, self.prompts, self.folder / name, settings))
        return critic

    def efficiency(self, points: list[dict[str, Any]], kl: float) -> float | None:
        """Return the frontier efficiency of a sweep at one KL and equal weights."""
        rewards = self.reference @ HALF
        base = float(rewards.mean())
        line = sorted((point["kl"], point["reward"]) for point in points)
        found = reward_at(
            torch.tensor([0.0, *(k for k, _ in line)], dtype=torch.float64),
            torch.tensor([base, *(r for _, r in line)], dtype=torch.float64),
            kl,
        )
        return efficiency_at(rewards, found, kl)


def cell(seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows of one seed."""
    manifest = {name: value for name, value in vars(arguments).items() if name not in ("seeds", "processes", "name")}
    rows_file, manifest_file = (
        Path(arguments.folder) / f"seed-{seed}.json",
        Path(arguments.folder) / f"seed-{seed}" / "bench.json",
    )
    if not matches_manifest(manifest_file, manifest, "a benchmark with different"):
        write_json(manifest_file, manifest)
    elif rows_file.is_file():
        found: list[dict[str, Any]] = json.loads(rows_file.read_text())
        return found
    lab = Lab(seed, arguments)
    aligned = {name: lab.aligned(name, objective, lab.policy) for name, objective in OBJECTIVES.items()}
    vectors = Vectors({name: AlignmentVector.between(lab.policy, model) for name, model in aligned.items()})
    rows: list[dict[str, Any]] = []

    def add(what: str, **metrics: Any) -> dict[str, Any]:
        rows.append({"what": what, "seed": seed} | metrics)
        print(seed, what, {name: value for name, value in metrics.items() if name != "errors"}, flush=True)
        return metrics

    ids = lab.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for name, model in aligned.items():
        with torch.no_grad(), vectors.applied(lab.policy, {name: 1.0}):
            expected = model(**ids).logits
            difference = (lab.policy(**ids).logits - expected).abs().max()
        add("exactness", vector=name, max_difference=float(difference), largest=float(expected.abs().max()))
        for level in LEVELS:
            with vectors.applied(lab.policy, {name: level}):
                add("level", coefficients={name: level}, **lab.measure(lab.policy, f"{name}-{level:g}"))
    for levels in itertools.product((0.0, 0.5, 1.0), repeat=2):
        with vectors.applied(lab.policy, both := dict(zip(OBJECTIVES, levels, strict=True))):
            add("two", coefficients=both, **lab.measure(lab.policy, "-".join(map(str, levels))))

    sweeps: dict[str, list[dict[str, Any]]] = {"vectors": [], "tilt": []}
    for level in (0.25, 0.5, 0.75, 1.0, 1.5):
        with vectors.applied(lab.policy, dict.fromkeys(OBJECTIVES, level)):
            measured = lab.measure(lab.policy, f"vectors-{level}")
        sweeps["vectors"].append(add("sweep", way="vectors", strength=level, **measured))
    critic = lab.critic("critic", lab.policy)
    for beta in BETAS:
        measured = lab.measure(lab.policy, f"tilt-{beta}", critic, beta)
        sweeps["tilt"].append(add("sweep", way="tilt", strength=beta, **measured))
    for level in arguments.merged:
        way = f"tilt on merged at {level:g}"
        with vectors.applied(lab.policy, dict.fromkeys(OBJECTIVES, level)):
            critic = lab.critic(f"critic-of-merged-{level}", lab.policy)
            sweeps[way] = [add("sweep", way=way, strength=0.0, **lab.measure(lab.policy, f"vectors-{level}"))]
            for beta in BETAS:
                measured = lab.measure(lab.policy, f"merged-{level}-{beta}", critic, beta)
                sweeps[way].append(add("sweep", way=way, strength=beta, **measured))
    for way, points in sweeps.items():
        for kl in TARGETS:
            add("efficiency", way=way, at_kl=kl, efficiency=lab.efficiency(points, kl))

    later = lab.aligned("readability", Readability(), lab.policy)
    stage = lab.measure(later, "later")
    add("stage", **stage)
    for name in OBJECTIVES:
        first = next(r for r in rows if r["what"] == "level" and r["coefficients"] == {name: 1.0})
        start = next(r for r in rows if r["what"] == "level" and r["coefficients"] == {name: 0.0})
        with vectors.applied(later, {name: 1.0}):
            moved = lab.measure(later, f"later-{name}")
        gain = first["rewards"][name] - start["rewards"][name]
        share = (moved["rewards"][name] - stage["rewards"][name]) / gain
        add("later stage", vector=name, gain=gain, gain_later=share * gain, share=share)
    write_json(rows_file, rows)
    return rows


def memory_rows() -> list[dict[str, Any]]:
    """Measure the memory of applying a vector to a policy of 100 million parameters, in copies of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=640, intermediate_size=1_728, num_hidden_layers=12, num_attention_heads=10
    )
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    other = copy.deepcopy(policy)
    for weight in other.parameters():
        weight.add_(0.01)
    copies = sum(weight.nbytes for weight in policy.parameters()) / 2**20
    extracted = AlignmentVector.between(policy, other)
    del other
    with tempfile.TemporaryDirectory() as folder:
        extracted.save(Path(folder) / "vector")
        rows = []
        # Beforehand there is the policy and, in the first case, a vector of the same size in memory.
        for where, vector, before in (
            ("memory", extracted, 2),
            ("folder", AlignmentVector.load(Path(folder) / "vector"), 1),
        ):

            def apply(vectors: Any) -> None:
                with vectors.applied(policy, {"all": 0.5}):
                    pass

            run = partial(apply, Vectors({"all": vector}))
            run()
            metrics = {
                "vector": where,
                "parameters": policy.num_parameters(),
                "copies": before + peak_mib(run) / copies,
            }
            rows.append({"what": "memory"} | metrics)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the benchmark and write `results/vectors.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="responses per prompt and point")
    parser.add_argument(
        "--reference-samples", type=int, default=2048, help="reference responses per prompt, for the optimal frontier"
    )
    parser.add_argument("--steps", type=int, default=AlignSettings.steps, help="steps of every alignment")
    parser.add_argument("--rollouts", type=int, default=4096, help="rollouts per iteration of every critic")
    parser.add_argument(
        "--merged", nargs="+", type=float, default=[0.25, 0.5], help="coefficients of both vectors under a tilt"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", default="outputs/vectors")
    parser.add_argument("--name", default="vectors", help="name of the result file")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = [row for found in pool.map(cell, arguments.seeds, [arguments] * len(arguments.seeds)) for row in found]
    for name in OBJECTIVES:
        levels = [r for r in rows if r["what"] == "level" and list(r["coefficients"]) == [name]]
        for level in LEVELS:
            values = [row["rewards"][name] for row in levels if row["coefficients"][name] == level]
            print(
                f"{name} at coefficient {level:g}: {mean(values):.2f} ({min(values):.2f} to {max(values):.2f})",
                flush=True,
            )
    results.write(arguments.name, vars(arguments), rows + memory_rows())


if __name__ == "__main__":
    main()
