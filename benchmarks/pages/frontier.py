"""Frontier efficiency: how close each critic comes to the optimum, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lib.formatting import DASH, mean_and_std, number, weights
from lib.results import read

from pages.layout import page as layout
from pages.layout import table

REFERENCE_KL = 2.0
"""The KL in nats at which every choice of weights is reported."""
README_METHODS = {
    "best": "hidden state, memory, conditioned",
    "memory": "hidden state, memory",
    "hidden": "hidden state",
    "paper": "value model, candidates (the paper's)",
}
README_KLS = (1.0, 2.0)


@dataclass(frozen=True)
class _Course:
    """The measurements of one policy and method, by KL and weights."""

    policy: str
    method: str
    rows: dict[tuple[float, tuple[float, ...]], dict[str, Any]]

    def row(self, choice: tuple[float, ...], kl: float = REFERENCE_KL) -> dict[str, Any]:
        return self.rows[kl, choice]

    def mean_at(self, kl: float, choices: Sequence[tuple[float, ...]]) -> float | None:
        """Average the efficiency over the weights; None unless it is known for all of them."""
        values = [self.row(choice, kl)["efficiency"] for choice in choices]
        return None if None in values else mean(values)


def page() -> str:
    """Write the page from `results/frontier.json`."""
    content = read("frontier")
    courses, choices, kls = _courses(content)
    methods = content["config"]["methods"]
    objectives = "`positive`, `dialogue`"
    shown = [kl for kl in kls if any(course.mean_at(kl, choices) is not None for course in courses)]
    about = "\n".join(
        f"- `{name}`: {method['about']}" for name, method in methods.items() if any(c.method == name for c in courses)
    )
    sources = "\n".join(f"- {name}: {source}" for name, source in content["config"]["policies"].items())
    by_weights = table(
        ["policy", "critic", *map(weights, choices)],
        [
            [course.policy, course.method, *(mean_and_std(course.row(choice), "efficiency") for choice in choices)]
            for course in courses
        ],
    )
    by_kl = table(
        ["policy", "critic", *(f"KL {kl:g}" for kl in shown)],
        [[course.policy, course.method, *(number(course.mean_at(kl, choices)) for kl in shown)] for course in courses],
    )
    cost = table(
        ["policy", "critic", "rollouts", "training", "speed", *(f"best-of-n at {weights(c)}" for c in choices)],
        [
            [
                course.policy,
                course.method,
                _rollouts(course, methods) if course.row(choices[0])["seeds"] else DASH,
                _minutes(course.row(choices[0])["train_seconds"]),
                number(course.row(choices[0])["decode_ratio"]),
                *(number(course.row(choice)["equivalent_n"], 0) for choice in choices),
            ]
            for course in courses
        ],
    )
    return layout(
        "Frontier efficiency",
        "How close does each critic come to the largest reward that is possible at a given KL, and what does it cost?",
        [
            "[Frontier efficiency](../concepts/frontier.md) is the share of the largest possible gain in weighted "
            "reward that is reached at a KL: 0 is the reference policy, 1 the optimum. The prompts are held out, the "
            f"objectives are {objectives}, and every one of {len(content['config']['seeds'])} seeds has its own "
            "training, sweep and estimate of the optimum. Policies:",
            sources,
            "Critics:",
            about,
            "![Frontier efficiency against KL, with best-of-n](frontier.svg)",
            f"## By weights at KL {REFERENCE_KL:g}\n\nMean and standard deviation over seeds, for the weights of "
            f"({objectives}).",
            by_weights,
            "## By KL\n\nMean over these weights and over seeds, in nats per response.",
            by_kl,
            _truncation(courses, choices) + _beyond(courses, choices, [kl for kl in kls if kl not in shown]),
            f"## Cost\n\nRollouts are iterations × responses. Training is processor time. Speed is tokens per second "
            "relative to plain `generate` at batch 8. Best-of-n is the n for which the best of n plain responses has "
            f"the same expected reward as one response at KL {REFERENCE_KL:g}.",
            cost,
        ],
        ("frontier", content),
    )


def readme_table() -> str:
    """Format the README's table of the main critics, with a caption."""
    content = read("frontier")
    courses, choices, _ = _courses(content)
    known = {(course.policy, course.method): course for course in courses}
    policies = sorted({course.policy for course in courses}, reverse=True)
    rows = []
    for method, name in README_METHODS.items():
        found = [known.get((policy, method)) for policy in policies]
        values = [c.mean_at(kl, choices) if c is not None else None for c in found for kl in README_KLS]
        speed = found[0].row(choices[0])["decode_ratio"] if found[0] is not None else None
        rows.append([name, *map(number, values), number(speed)])
    header = ["critic", *(f"{policy}, KL {kl:g}" for policy in policies for kl in README_KLS), "speed"]
    caption = (
        f"Frontier efficiency of two small story models, averaged over {len(choices)} choices of weights and "
        f"{len(content['config']['seeds'])} seeds, and the\nspeed of tilted relative to plain decoding ({policies[0]}, "
        "batch 8):"
    )
    return f"{caption}\n\n{table(header, rows)}"


def _courses(content: dict[str, Any]) -> tuple[list[_Course], list[tuple[float, ...]], list[float]]:
    """Group the rows of trained methods; return them with all weights and KLs."""
    rows = [row for row in content["rows"] if row["method"] in content["config"]["methods"]]
    groups: dict[tuple[str, str], dict[tuple[float, tuple[float, ...]], dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["method"]), {})[row["kl"], tuple(row["weights"])] = row
    courses = [_Course(policy, method, group) for (policy, method), group in groups.items()]
    choices = list(dict.fromkeys(tuple(row["weights"]) for row in rows))
    return courses, choices, sorted({row["kl"] for row in rows})


def _rollouts(course: _Course, methods: dict[str, Any]) -> str:
    method = methods[course.method]
    name, iterations = method.get("iterations_of", (course.method, None))
    improvement = methods[name]["improvement"]
    return f"{iterations or improvement['iterations']} × {improvement['rollouts']:,}"


def _minutes(seconds: float | None) -> str:
    return f"{seconds / 60:.0f} min" if seconds else DASH


def _truncation(courses: Sequence[_Course], choices: Sequence[tuple[float, ...]]) -> str:
    """Report the KL of truncation alone, where a method truncates."""
    costs = [
        f"{row['truncation_kl']:.1f} nats per response for `{course.method}` on {course.policy}"
        for course in courses
        if (row := course.row(choices[0]))["truncation_kl"]
    ]
    if not costs:
        return ""
    return (
        f"Truncation to the candidates alone costs {' and '.join(costs)}; a method for which it exceeds the largest KL "
        "was not trained. "
    )


def _beyond(courses: Sequence[_Course], choices: Sequence[tuple[float, ...]], kls: Sequence[float]) -> str:
    """List single measurements at KLs where the optimum is not known for all weights."""
    found = [
        f"`{course.method}` {mean_and_std(row, 'efficiency')} on {course.policy} at {weights(choice)}, KL {kl:g}"
        for course in courses
        for kl in kls
        for choice in choices
        if (row := course.row(choice, kl))["efficiency"] is not None
    ]
    return f"At larger KLs the optimum is known for some weights only: {'; '.join(found)}." if found else ""
