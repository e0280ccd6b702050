"""Write the README's figures from the committed results, or check that they are the same.

python benchmarks/figures.py            rewrite the part of README.md between its markers
python benchmarks/figures.py --check    exit with 1 if that part is not what the results say
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from figures_decode import overhead
from lib.tables import RESULTS, ranged, read, table

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- figures: made by benchmarks/figures.py -->\n", "<!-- end of figures -->"


def efficiency() -> str:
    """The demo: frontier efficiency by weights and KL, mean and range over seeds."""
    content = read("demo")
    groups: dict[tuple[str, float], list[float]] = {}
    for row in content["rows"]:
        groups.setdefault((json.dumps(row["weights"]), row["kl"]), []).append(row["efficiency"])
    weights = list(dict.fromkeys(name for name, _ in groups))
    kls = list(dict.fromkeys(kl for _, kl in groups))
    rows = [
        [
            ", ".join(f"{n} {w:g}" for n, w in json.loads(name).items()),
            *(ranged(groups[name, kl]) for kl in kls),
        ]
        for name in weights
    ]
    seconds = sorted({row["seed"]: row["seconds"] for row in content["rows"]}.values())
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Frontier efficiency in the demo on prompts that were not trained on, mean and range of {len(seconds)} seeds. "
        f"One run took {seconds[0]:.0f} to {seconds[-1]:.0f} s on {where} (`benchmarks/bench_demo.py`):\n\n"
        + table(["weights", *(f"at KL {kl:g}" for kl in kls)], rows)
    )


def frontier() -> str:
    """Methods beside each other: how close they come to the optimum, and their price."""
    content = read("frontier")
    methods, config = content["config"]["methods"], content["config"]
    rows = [row for row in content["rows"] if row["method"] in methods]
    asked = 2.0  # nats at which every choice of weights is shown
    kls = sorted({row["kl"] for row in rows})
    choices = list(dict.fromkeys(tuple(row["weights"]) for row in rows))
    groups: dict[tuple[str, str], dict[tuple[float, tuple[float, ...]], dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["method"]), {})[row["kl"], tuple(row["weights"])] = row
    whole = [kl for kl in kls if any(_mean_at(here, kl, choices) is not None for here in groups.values())]
    told = []
    for (policy, method), here in groups.items():
        one = here[asked, choices[0]]
        how = methods[methods[method]["rounds_of"][0] if "rounds_of" in methods[method] else method]["improvement"]
        rounds = methods[method]["rounds_of"][1] if "rounds_of" in methods[method] else how["iterations"]
        told.append(
            [
                policy,
                method,
                f"{rounds} × {how['rollouts']:,}" if one["seeds"] else "–",
                *(_plus_minus(here[asked, choice], "efficiency") for choice in choices),
                *(_shown(_mean_at(here, kl, choices)) for kl in whole),
                " / ".join(_shown(here[asked, choice]["as_best_of"], 0) for choice in choices),
                f"{one['train_seconds'] / 60:.0f} min" if one["train_seconds"] else "–",
                _shown(one["decode_ratio"]),
            ]
        )
    about = "".join(
        f"\n- `{name}`: {how['about']};" for name, how in methods.items() if any(name == t[1] for t in told)
    )
    shown = [_named(choice) for choice in choices]
    cut = [
        f"{here[asked, choices[0]]['cut_kl']:.1f} nats a response for `{method}` on {policy}"
        for (policy, method), here in groups.items()
        if here[asked, choices[0]]["cut_kl"]
    ]
    beyond = [
        f"`{method}` {_plus_minus(here[kl, choice], 'efficiency')} on {policy} at {name}, KL {kl:g}"
        for (policy, method), here in groups.items()
        for kl in kls
        for choice, name in zip(choices, shown, strict=True)
        if kl not in whole and here[kl, choice]["efficiency"] is not None
    ]
    return (
        "Frontier efficiency of several critics on prompts that were not trained on: at KL "
        f"{asked:g} by weights (`positive`, `dialogue`), with the standard deviation over {len(config['seeds'])} seeds "
        "of training, sweep and limit; its mean over these weights at each KL; the n whose best of n responses earns "
        f"as much as one at KL {asked:g}, by weights; the processor time that training took; and tokens per second "
        f"beside plain `generate` at batch 8 (`benchmarks/bench_frontier.py`):\n{about[:-1]}.\n\n"
        + table(
            [
                "policy",
                "critic",
                "rollouts",
                *shown,
                *(f"mean at KL {kl:g}" for kl in whole),
                "as best of",
                "training",
                "speed",
            ],
            told,
        )
        + (
            f"\nThe cut to candidates alone costs {' and '.join(cut)}; what costs more than 4 was not trained.\n"
            if cut
            else ""
        )
        + (f"\nWhere the limit is known beyond that: {'; '.join(beyond)}.\n" if beyond else "")
        + "\n![Frontier efficiency against KL, with the best of n](benchmarks/results/frontier.svg)\n"
    )


def _mean_at(here: dict[Any, dict[str, Any]], kl: float, choices: Sequence[Any]) -> float | None:
    found = [here[kl, choice]["efficiency"] for choice in choices]
    return None if None in found else mean(found)


def _shown(figure: float | None, digits: int = 2) -> str:
    return "–" if figure is None else f"{figure:.{digits}f}"


def _named(weights: Sequence[float]) -> str:
    return f"({', '.join(f'{weight:g}' for weight in weights)})"


def _plus_minus(row: dict[str, Any], name: str) -> str:
    spread = row[name + "_std"]
    return _shown(row[name]) + ("" if spread is None else f" ± {spread:.2f}")


def rounds() -> str:
    """J_w after each round of training, and every fall that is more than chance."""
    content = read("rounds")
    groups: dict[tuple[str, str], dict[str, dict[int, list[dict[str, Any]]]]] = {}
    for row in content["rows"]:
        choice = _named(row["weights"])
        by_round = groups.setdefault((row["policy"], row["method"]), {}).setdefault(choice, {})
        by_round.setdefault(row["rounds"], []).append(row)
    choices = list(dict.fromkeys(choice for group in groups.values() for choice in group))
    means = {
        (*key, choice): [(mean(row["j"] for row in found), _error_of_mean(found)) for found in group[choice].values()]
        for key, group in groups.items()
        for choice in choices
    }
    told = [
        [*key, *(" → ".join(f"{j:.2f} ± {error:.2f}" for j, error in means[*key, choice]) for choice in choices)]
        for key in groups
    ]
    falls = [
        f"`{method}` on {policy} at {choice} in round {done}, by {before[0] - after[0]:.2f}"
        for (policy, method, choice), course in means.items()
        for done, (before, after) in enumerate(pairwise(course), start=1)
        if before[0] - after[0] > 2 * math.hypot(before[1], after[1])
    ]
    beta, seeds = content["config"]["beta"], len(content["config"]["seeds"])
    return (
        f"J_w = reward − KL/β at β = {beta:g} before training (of the reference policy, cut as the method is) and "
        f"after each round, by weights, mean of {seeds} seeds and its sampling error, on prompts that were not trained "
        "on (`benchmarks/bench_iterations.py`):\n\n"
        + table(["policy", "critic", *choices], told)
        + f"\nFalls of more than two standard errors: {'; '.join(falls) or 'none'}.\n"
    )


def _error_of_mean(found: list[dict[str, Any]]) -> float:
    return math.sqrt(sum(row["error"] ** 2 for row in found)) / len(found)


def _averaged(found: list[float | None]) -> str:
    return "–" if None in found else ranged(found)


def serving() -> str:
    """The price of a tilt inside vLLM."""
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
        f"Throughput inside vLLM on {where} with a critic of the independent composition, as a share of plain requests "
        "in the same engine, and of an engine without the processor (`benchmarks/bench_vllm.py`; "
        f"{content['config']['new_tokens']} tokens after {content['config']['context']}, medians over rounds by "
        "turns), by requests at once:\n\n" + table(["policy", "", *map(str, shown)], rows)
    )


def optimum() -> str:
    """Exact worlds: what is reached of what can be gained, with exact values and with learnt ones."""
    exact, learnt = read("exact"), read("exact-learnt")
    config = learnt["config"]
    beta, last = config["beta"], config["iterations"]
    shown = sorted({0, 1, 2, max(row["iteration"] for row in exact["rows"])})
    groups: dict[tuple[str, str, int], list[float]] = {}
    for row in exact["rows"]:
        if row["beta"] == beta and max(row["weights"]) < 1:
            groups.setdefault((row["kind"], row["composition"], row["iteration"]), []).append(row["share"])
    rows = [
        [kind, composition, *(ranged(groups[kind, composition, iteration], 3) for iteration in shown)]
        for kind, composition in dict.fromkeys(key[:2] for key in groups)
    ]
    ends: dict[tuple[str, str, tuple[float, ...]], list[float]] = {}
    for row in learnt["rows"]:
        if row["iteration"] == last:
            ends.setdefault((row["composition"], row["critic"], tuple(row["weights"])), []).append(row["share"])
    choices = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    names = {"exact": "exact values", "hidden_state": "learnt heads"}
    told = [
        [composition, names[critic], *(ranged(ends[composition, critic, choice], 3) for choice in choices)]
        for composition, critic in dict.fromkeys(key[:2] for key in ends)
    ]
    seeds = len({row["seed"] for row in exact["rows"]})
    return (
        "Share of the gain J* − J_ref that is reached in worlds that dynamic programming solves, with exact values at "
        f"β = {beta:g}, by iteration: mean and range over {seeds} worlds of each kind and the mixtures of a grid of "
        "weights; for one objective alone the compositions are the same (`benchmarks/bench_exact.py`):\n\n"
        + table(["rewards", "composition", *(f"iteration {iteration}" for iteration in shown)], rows)
        + f"\nThe same by weights with heads that were trained from {config['rollouts']:,} sampled responses per "
        f"iteration, in one {config['kind']} world after iteration {last}: mean and range of {len(config['seeds'])} "
        "seeds (`benchmarks/bench_exact_learnt.py`):\n\n" + table(["composition", "", *map(_named, choices)], told)
    )


def sharing() -> str:
    """Many processes: what a second one brings."""
    content = read("processes")
    one, two = content["rows"]
    return (
        f"Two processes with one thread each sample {two['rollouts_per_second']:.0f} rollouts a second from the "
        f"embedded policy, {two['ratio']:.2f} times as many as one (`benchmarks/bench_processes.py`, medians of "
        f"{len(one['rounds'])} rounds by turns, without the start).\n"
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


def vectors() -> str:
    """Alignment vectors: reward by level, beside a tilt and under one, and what is left of them at a later stage."""
    content = read("vectors")
    rows = content["rows"]
    groups: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if row["what"] == "level":
            [(name, level)] = row["coefficients"].items()
            groups.setdefault((name, level), []).append(row["rewards"][name])
    levels = sorted({level for _, level in groups})
    names = list(dict.fromkeys(name for name, _ in groups))
    by_level = [[name, *(ranged(groups[name, level]) for level in levels)] for name in names]
    ways: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["what"] == "sweep":
            plain = [] if "merged" in row["way"] else [(0.0, 0.0)]
            ways.setdefault(row["way"], {}).setdefault(row["seed"], plain).append((row["kl"], row["reward"]))
    kls = (0.5, 1.0, 2.0, 3.0, 4.0)
    by_way = [
        [way, *(_averaged([_reward_at(sorted(line), kl) for line in lines.values()]) for kl in kls)]
        for way, lines in ways.items()
    ]
    shares = [
        f"{ranged([r['share'] for r in rows if r['what'] == 'later stage' and r['vector'] == name])} for `{name}`"
        for name in names
    ]
    exact = max(row["max_difference"] / row["largest"] for row in rows if row["what"] == "exactness")
    copies = {row["vector"]: row["copies"] for row in rows if row["what"] == "memory"}
    seeds = len(content["config"]["seeds"])
    return (
        "Reward (standard deviations of the embedded policy) of each objective's alignment vector by its coefficient, "
        f"mean and range of {seeds} seeds (`benchmarks/bench_vectors.py`; with coefficient 1 the logits are those of "
        f"the aligned model to {exact:.0e} of the largest):\n\n"
        + table(["vector", *(f"{level:g}" for level in levels)], by_level)
        + "\nReward at equal weights by both vectors at once, by a tilt, and by a tilt on policies that both vectors "
        "have been merged into, at the same KL to the embedded policy:\n\n"
        + table(["way", *(f"at KL {kl:g}" for kl in kls)], by_way)
        + "\nAdded to a policy that was trained on (for `readability`), the vectors gain so many times what they gain "
        f"on the policy that they were made for: {', '.join(shares)}. Applying a vector to a policy of 100 million "
        "parameters takes "
        f"{copies['memory']:.2f} times the policy's weights in all with the vector in memory, {copies['folder']:.2f} "
        "times with the vector in a folder.\n\n"
        "![Reward against coefficient, and ways of steering at the same KL](benchmarks/results/vectors.svg)\n"
    )


def _reward_at(line: list[tuple[float, float]], kl: float) -> float | None:
    """Read a sweep (KL, reward) between its points; None beyond them."""
    if not line[0][0] <= kl <= line[-1][0]:
        return None
    return float(np.interp(kl, *zip(*line, strict=True)))


SECTIONS = {
    "demo": efficiency,
    "frontier": frontier,
    "rounds": rounds,
    "exact": optimum,
    "decode": overhead,
    "vllm": serving,
    "processes": sharing,
    "vectors": vectors,
    "preferences": choices,
}


def main() -> int:
    """Rewrite or check; return the exit status."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    told = [section() for name, section in SECTIONS.items() if (RESULTS / f"{name}.json").is_file()]
    made = before + START + "\n" + "\n".join(told) + "\n" + END + after
    if "--check" in sys.argv[1:]:
        if made != text:
            print("README.md does not hold the figures of benchmarks/results; run python benchmarks/figures.py")
            return 1
        return 0
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
