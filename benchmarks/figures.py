"""Write the README's figures from the committed results, or check that they are the same.

python benchmarks/figures.py            rewrite the part of README.md between its markers
python benchmarks/figures.py --check    exit with 1 if that part is not what the results say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
START, END = "<!-- figures: made by benchmarks/figures.py -->\n", "<!-- end of figures -->"


def read(name: str) -> dict[str, Any]:
    """Read one result file."""
    content: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay a table out in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def efficiency() -> str:
    """The demo: frontier efficiency by weights and KL, mean and range over seeds."""
    content = read("demo")
    groups: dict[tuple[str, float], list[float]] = {}
    for row in content["rows"]:
        groups.setdefault((json.dumps(row["weights"]), row["kl"]), []).append(row["efficiency"])
    weights = list(dict.fromkeys(name for name, _ in groups))
    kls = list(dict.fromkeys(kl for _, kl in groups))

    def cell(key: tuple[str, float]) -> str:
        found = [value for value in groups[key] if value is not None]
        return f"{mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "–"

    rows = [
        [", ".join(f"{n} {w:g}" for n, w in json.loads(name).items()), *(cell((name, kl)) for kl in kls)]
        for name in weights
    ]
    seconds = sorted({row["seed"]: row["seconds"] for row in content["rows"]}.values())
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Frontier efficiency in the demo on prompts that were not trained on, mean and range of {len(seconds)} seeds. "
        f"One run took {seconds[0]:.0f} to {seconds[-1]:.0f} s on {where} (`benchmarks/bench_demo.py`):\n\n"
        + table(["weights", *(f"at KL {kl:g}" for kl in kls)], rows)
    )


def overhead() -> str:
    """The price of a tilt: tokens per second against plain `generate`, and what else a user waits or pays for."""
    content = read("decode")
    config, rows = content["config"], content["rows"]
    base = config["context"]
    policies = {"random": "random Llama 8 × 512, 32,000 tokens"}
    speeds = [row for row in rows if row["what"] == "speed"]
    near = {(row["policy"], *_kind(row), row["batch"]): row["ratio"] for row in speeds if row["context"] == base}
    batches = sorted({key[-1] for key in near})
    told = [
        [
            policies.get(key[0], key[0]),
            key[1],
            str(key[2]),
            str(key[3]),
            *(_share(near.get((*key, b))) for b in batches),
        ]
        for key in dict.fromkeys(key[:-1] for key in near)
        if key[0] == "random" or key[2:] == (2, 40)
    ]
    far = {
        (*_kind(row), row["context"]): row["ratio"] for row in speeds if row["policy"] == "random" and row["batch"] == 1
    }
    contexts = sorted({key[-1] for key in far if key[-1] != base})
    longer = [
        [key[0], *(_share(far.get((*key, context))) for context in contexts)]
        for key in dict.fromkeys(key[:-1] for key in far if key[-1] != base)
    ]
    first = [row for row in rows if row["what"] == "first token" and row["policy"] == "random"]
    waits = {(row["critic"] and _kind(row)[0], row["context"]): row for row in first}
    ends = sorted({context for _, context in waits})
    waited = [
        [
            critic or "plain",
            *(f"{waits[critic, context]['milliseconds']:.0f} ms" for context in ends),
            *(f"{waits[critic, context]['peak_mib']:.0f} MiB" for context in ends),
        ]
        for critic in dict.fromkeys(critic for critic, _ in waits)
    ]
    ragged = max(row["max_difference"] for row in rows if row["what"] == "ragged")
    helped = [
        [(row["critic"] and _kind(row)[0]) or "plain", row["what"], f"{row['ratio']:.2f}"]
        for row in rows
        if row["what"] in ("draft model", "prompt lookup")
    ]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Tokens per second of tilted decoding as a share of plain `generate` on {where} "
        f"(`benchmarks/bench_decode.py`; {config['new_tokens']} tokens after {base}, medians of at least "
        f"{config['repeats']} rounds in which each way runs between two plain runs). A value model has half the "
        "policy's layers and width; the official step is that of the paper's scripts, one such model for each "
        "objective, or one for all once they are distilled:\n\n"
        + table(["policy", "critic", "objectives", "candidates", *(f"batch {batch}" for batch in batches)], told)
        + "\nThe same for one longer prompt (random Llama, 2 objectives, 40 candidates):\n\n"
        + table(["critic", *(f"{context:,} tokens" for context in contexts)], longer)
        + f"\nWhat one prompt of {ends[0]:,} and of {ends[-1]:,} tokens waits for its first token, and the memory that "
        f"{config['new_tokens']} tokens take beside the weights:\n\n"
        + table(
            ["critic", *(f"first token, {c:,}" for c in ends), *(f"memory, {c:,}" for c in ends)],
            waited,
        )
        + "\nThe values of 16 prompts of different length in one batch differ from those of each alone by "
        f"{ragged:.0e} at most. Greedy assisted decoding gives the tokens it gives unassisted, so many times as fast "
        "(the draft has one layer and mostly agrees):\n\n" + table(["critic", "help", "speed"], helped)
    )


def _kind(row: dict[str, Any]) -> tuple[str, int, int]:
    names = {"hidden_state": "hidden state", "value_model": "value model", None: ""}
    critic = names.get(row["critic"], row["critic"])
    return f"{critic}, {row['readout']}" if row["readout"] else critic, row["objectives"], row["top_k"]


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.3f}"


def optimum() -> str:
    """Exact worlds: what is reached of what can be gained, with exact values and with learnt ones."""
    exact, learnt = read("exact"), read("exact-learnt")
    config = learnt["config"]
    beta, last = config["beta"], config["iterations"]
    shown = sorted({0, 1, 2, max(row["iteration"] for row in exact["rows"])})
    groups: dict[tuple[str, str, int], list[float]] = {}
    for row in exact["rows"]:
        if row["beta"] == beta:
            groups.setdefault((row["kind"], row["composition"], row["iteration"]), []).append(row["share"])

    def cell(found: list[float]) -> str:
        return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"

    rows = [
        [kind, composition, *(cell(groups[kind, composition, iteration]) for iteration in shown)]
        for kind, composition in dict.fromkeys(key[:2] for key in groups)
    ]
    ends: dict[tuple[str, str], list[float]] = {}
    for row in learnt["rows"]:
        if row["weights"] == [0.5, 0.5] and row["iteration"] == last:
            ends.setdefault((row["composition"], row["critic"]), []).append(row["share"])
    told = [
        [composition, f"{ends[composition, 'exact'][0]:.3f}", cell(ends[composition, "hidden_state"])]
        for composition in dict.fromkeys(composition for composition, _ in ends)
    ]
    seeds = len({row["seed"] for row in exact["rows"]})
    return (
        "Share of the gain J* − J_ref that is reached in worlds that dynamic programming solves, with exact values at "
        f"β = {beta:g}, by iteration: mean and range over {seeds} worlds of each kind and a grid of weights "
        "(`benchmarks/bench_exact.py`):\n\n"
        + table(["rewards", "composition", *(f"iteration {iteration}" for iteration in shown)], rows)
        + f"\nThe same at equal weights with heads that were trained from {config['rollouts']:,} sampled responses per "
        f"iteration, in one {config['kind']} world after {last} iterations: mean and range of {len(config['seeds'])} "
        "seeds (`benchmarks/bench_exact_learnt.py`):\n\n" + table(["composition", "exact values", "learnt heads"], told)
    )


def main() -> int:
    """Rewrite or check; return the exit status."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    made = before + START + "\n" + efficiency() + "\n" + optimum() + "\n" + overhead() + "\n" + END + after
    if "--check" in sys.argv[1:]:
        if made != text:
            print("README.md does not hold the figures of benchmarks/results; run python benchmarks/figures.py")
            return 1
        return 0
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
