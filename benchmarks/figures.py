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
    """The price of a tilt: tokens per second against plain `generate`."""
    content = read("decode")
    ratios = {
        (row["policy"], row["objectives"], row["top_k"], row["batch"]): f"{row['ratio']:.3f}" for row in content["rows"]
    }
    batches = sorted({batch for *_, batch in ratios})
    rows = [
        [
            {"random": "random Llama 8 × 512, 32,000 tokens"}.get(policy, policy),
            str(objectives),
            str(top_k),
            *(ratios.get((policy, objectives, top_k, batch), "–") for batch in batches),
        ]
        for policy, objectives, top_k in dict.fromkeys(key[:-1] for key in ratios)
    ]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Tokens per second of tilted decoding as a share of plain `generate` on {where} "
        f"(`benchmarks/bench_decode.py`; "
        f"{content['config']['new_tokens']} tokens after {content['config']['context']}, medians of at least "
        f"{content['config']['repeats']} rounds in which each way runs between two plain runs):\n\n"
        + table(["policy", "objectives", "candidates", *(f"batch {batch}" for batch in batches)], rows)
    )


def serving() -> str:
    """The price of a tilt inside vLLM; nothing as long as it has not been measured."""
    if not (HERE / "results" / "vllm.json").is_file():
        return ""
    content = read("vllm")
    ratios = {(row["policy"], row["what"], row["concurrency"]): f"{row['ratio']:.3f}" for row in content["rows"]}
    shown = sorted({concurrency for *_, concurrency in ratios})
    rows = [
        [
            {"random": "random Llama 8 × 512, 32,000 tokens"}.get(policy, policy),
            {"tilted": "all requests tilted", "none asks": "processor loaded, no request tilted"}[what],
            *(ratios.get((policy, what, concurrency), "–") for concurrency in shown),
        ]
        for policy, what in dict.fromkeys(key[:-1] for key in ratios)
    ]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Throughput inside vLLM on {where}, as a share of plain requests in the same engine, and of an engine without "
        f"the processor (`benchmarks/bench_vllm.py`; {content['config']['new_tokens']} tokens after "
        f"{content['config']['context']}, medians over rounds by turns), by requests at once:\n\n"
        + table(["policy", "", *map(str, shown)], rows)
        + "\n"
    )


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


def choices() -> str:
    """Weights from choices: how wrong they are, and whether their intervals hold what they say."""
    content = read("preferences")
    rows = {(row["objectives"], row["how"], row["pairs"]): row for row in content["rows"]}
    most = max(pairs for *_, pairs in rows)
    shown = sorted({1, most // 2, most})
    told = [
        [
            str(objectives),
            {"random": "as they come", "chosen": "chosen"}[how],
            *(
                f"{rows[objectives, how, n]['angle']:.0f}° ± {rows[objectives, how, n]['angle_stderr']:.1f}"
                for n in shown
            ),
            f"{rows[objectives, how, most]['coverage']:.3f}",
        ]
        for objectives, how in dict.fromkeys(key[:2] for key in rows)
    ]
    return (
        f"Angle between inferred and true weights of {content['config']['users']} simulated users, mean and standard "
        "error by the number of pairs they chose from, and how often the 95 % intervals hold the true weight "
        "(`benchmarks/bench_preferences.py`):\n\n"
        + table(["objectives", "pairs", *(f"after {n}" for n in shown), f"coverage after {most}"], told)
    )


def main() -> int:
    """Rewrite or check; return the exit status."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    made = (
        before
        + START
        + "\n"
        + efficiency()
        + "\n"
        + optimum()
        + "\n"
        + overhead()
        + "\n"
        + serving()
        + choices()
        + "\n"
        + END
        + after
    )
    if "--check" in sys.argv[1:]:
        if made != text:
            print("README.md does not hold the figures of benchmarks/results; run python benchmarks/figures.py")
            return 1
        return 0
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
