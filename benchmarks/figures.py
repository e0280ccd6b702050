"""Regenerates the benchmark pages and plots of the documentation, and the README's table, from the result files.

    python benchmarks/figures.py            write docs/benchmarks/ and the table between README.md's markers
    python benchmarks/figures.py --check    exit with 1 if a page or the table differs from the result files

Plots are drawn anew only when writing, since their bytes depend on the version of Matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import plots.frontier
import plots.vectors
from lib.results import read
from pages import budgets, decoding, demo, exact, frontier, iterations, preferences, processes, vectors, vllm

from mavis.utils.files import atomic_file

ROOT = Path(__file__).resolve().parent.parent
README, PAGES_FOLDER = ROOT / "README.md", ROOT / "docs" / "benchmarks"
START, END = "<!-- figures: made by benchmarks/figures.py -->\n", "<!-- end of figures -->"
PAGES = {
    "frontier": frontier.page,
    "iterations": iterations.page,
    "exact": exact.page,
    "budgets": budgets.page,
    "decoding": decoding.page,
    "vllm": vllm.page,
    "processes": processes.page,
    "vectors": vectors.page,
    "preferences": preferences.page,
    "demo": demo.page,
}
PLOTS = {"frontier": plots.frontier.draw, "vectors": plots.vectors.draw}


def generated() -> dict[Path, str]:
    """Return the text of every generated file by its path; README.md with a new table between its markers."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    files = {PAGES_FOLDER / f"{name}.md": page() for name, page in PAGES.items()}
    return files | {README: f"{before}{START}\n{frontier.readme_table()}\n\n{END}{after}"}


def draw_plots() -> None:
    """Draw all plots into the folder of the pages."""
    for name, draw in PLOTS.items():
        # A fixed salt keeps the ids inside the SVG the same from run to run.
        with matplotlib.rc_context({"svg.hashsalt": name}), atomic_file(PAGES_FOLDER / f"{name}.svg") as temporary:
            draw(read(name)["rows"]).savefig(temporary, format="svg", metadata={"Date": None})


def main() -> int:
    """Write or check the generated files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    files = generated()
    if arguments.check:
        outdated = [
            str(path.relative_to(ROOT))
            for path, text in files.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        if outdated:
            print(f"outdated: {', '.join(outdated)}; run python benchmarks/figures.py", file=sys.stderr)
        return int(bool(outdated))
    for path, text in files.items():
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    draw_plots()
    return 0


if __name__ == "__main__":
    sys.exit(main())
