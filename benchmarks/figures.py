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
    rows = [
        [
            {"random": "random Llama 8 × 512, 32,000 tokens"}.get(row["policy"], row["policy"]),
            str(row["batch"]),
            str(row["objectives"]),
            str(row["top_k"]),
            f"{row['ratio']:.3f}",
        ]
        for row in content["rows"]
    ]
    where = f"{content['hardware']['cores']} cores of an {content['hardware']['cpu']}"
    return (
        f"Tokens per second of tilted decoding as a share of plain `generate` on {where} "
        f"(`benchmarks/bench_decode.py`; "
        f"{content['config']['new_tokens']} tokens after {content['config']['context']}, medians of at least "
        f"{content['config']['repeats']} rounds in which each way runs between two plain runs):\n\n"
        + table(["policy", "batch", "objectives", "candidates", "ratio"], rows)
    )


def main() -> int:
    """Rewrite or check; return the exit status."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    made = before + START + "\n" + efficiency() + "\n" + overhead() + "\n" + END + after
    if "--check" in sys.argv[1:]:
        if made != text:
            print("README.md does not hold the figures of benchmarks/results; run python benchmarks/figures.py")
            return 1
        return 0
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
