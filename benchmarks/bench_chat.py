"""What can be learnt from preference pairs for a small chat model? Trains reward models on SmolLM2-135M-Instruct.

    python benchmarks/bench_chat.py --pairs helpful=pairs.jsonl.gz harmless=harmless-base.test.jsonl.gz

For every file and seed a reward model is trained on the policy's own trunk, with adapters, and measured on pairs whose
first turn it has not seen, beside a rule that knows the lengths alone. An interrupted run resumes when rerun; rows of
files and seeds that are not given again are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lib import results

from mavis.data import Pair, load_pairs
from mavis.policies import load_policy
from mavis.training import RewardModelSettings, train_reward_model


def main() -> None:
    """Train, measure and write `results/chat-rewards.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", required=True, metavar="NAME=FILE", help="an objective and its pairs")
    parser.add_argument("--policy", default="smollm2", help="smollm2, a folder or a hub id of a chat model")
    parser.add_argument("--limit", type=int, default=1_000, help="pairs to use of each file, drawn by the seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--folder", default="outputs/chat", help="of the reward models")
    parser.add_argument("--name", default="chat-rewards", help="name of the result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy, tokenizer = load_policy(arguments.policy)
    rows = []
    for seed in arguments.seeds:
        for name, _, source in (entry.partition("=") for entry in arguments.pairs):
            folder = Path(arguments.folder) / f"{name}-{seed}"
            rows.append(train(policy, tokenizer, load_pairs(source, report=print), folder, arguments.limit, seed))
            rows[-1] = {"objective": name, "seed": seed} | rows[-1]
            print(rows[-1], flush=True)
            config = {key: value for key, value in vars(arguments).items() if key not in ("pairs", "name", "seeds")}
            config["policy"] = Path(arguments.policy).name
            results.write(arguments.name, config, kept(arguments.name, rows) + rows)


def kept(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run that are not measured again."""
    if not (results.RESULTS / f"{name}.json").is_file():
        return []
    measured = {(row["objective"], row["seed"]) for row in rows}
    return [row for row in results.read(name)["rows"] if (row["objective"], row["seed"]) not in measured]


def train(policy: Any, tokenizer: Any, pairs: list[Pair], folder: Path, limit: int, seed: int) -> dict[str, Any]:
    """Train and measure one reward model; return its metrics."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    settings = RewardModelSettings(
        template="chat", held_out=0.2, max_length=256, micro_pairs=4, precision="bfloat16", seed=seed
    )
    report = train_reward_model(policy, tokenizer, [pairs[index] for index in order[:limit]], folder, settings)
    metrics = ("accuracy", "baseline_accuracy", "gain", "log_loss", "calibration_error", "length_correlation")
    errors = ("accuracy_error", "gain_error")
    return {
        "training_pairs": report.training_pairs,
        "held_out_pairs": report.held_out_pairs,
        "held_out_prompts": report.held_out_prompts,
        "baseline": report.baseline,
        **{name: round(getattr(report, name), 4) for name in (*metrics, *errors) if getattr(report, name) is not None},
        "reliability": report.reliability,
        "seconds": round(report.seconds),
    }


if __name__ == "__main__":
    main()
