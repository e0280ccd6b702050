"""Plots frontier efficiency against KL for every critic, with best-of-n sampling."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "paper": "#8c6d31",
    "trunk": "#bd9e39",
    "hidden": "#9ecae1",
    "memory": "#4292c6",
    "conditioned": "#2171b5",
    "best": "#08306b",
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Plot the rows of `results/frontier.json`, with a panel per policy and choice of weights."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    weights = list(dict.fromkeys(tuple(row["weights"]) for row in rows))
    figure = Figure(figsize=(9, 0.8 + 2.6 * len(policies)), layout="constrained")
    panels = figure.subplots(len(policies), len(weights), sharex=True, sharey=True, squeeze=False)
    for line, policy in enumerate(policies):
        for column, choice in enumerate(weights):
            axes = panels[line][column]
            axes.set_title(f"{policy}: positive {choice[0]:g}, dialogue {choice[1]:g}", fontsize=8.5, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.axhline(1.0, color="#999999", linewidth=1.2)
            shown = [
                r
                for r in rows
                if r["policy"] == policy and tuple(r["weights"]) == choice and r["efficiency"] is not None
            ]
            for method in COLOURS:
                if not (found := [row for row in shown if row["method"] == method]):
                    continue
                axes.errorbar(
                    [row["kl"] for row in found],
                    [row["efficiency"] for row in found],
                    yerr=[row["efficiency_std"] or 0.0 for row in found],
                    color=COLOURS[method], marker="o", markersize=4, capsize=2, linewidth=1.4, label=method,
                )  # fmt: skip
            for row in (row for row in shown if row["method"].startswith("best_of_")):
                axes.plot(row["kl"], row["efficiency"], "x", color="#cb181d", label="best-of-n, at n times the cost")
                n = row["method"].removeprefix("best_of_")
                axes.annotate(n, (row["kl"], row["efficiency"]), (3, -9), textcoords="offset points", fontsize=7.5)
    legend: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True)) | legend
    figure.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=8.5)
    figure.supxlabel("KL to the reference policy (nats per response)", fontsize=9)
    figure.supylabel("frontier efficiency (1 is the optimum), ± one standard deviation over seeds", fontsize=9)
    return figure
