"""How close does the demo come to the optimum, and how long does it take? Runs the demo once per seed.

    python benchmarks/bench_demo.py [--seeds 0 1 2] [name=value ...]

The runs start from empty folders, one after another, so each takes as long as it would for a user.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from lib import results


def main() -> None:
    """Run the benchmark and write `results/demo.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="demo", help="name of the result file")
    parser.add_argument("overrides", nargs="*", help="settings of the demo")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = ["demo", f"seed={seed}", f"output={folder}", *arguments.overrides]
            subprocess.run([sys.executable, "-m", "mavis.cli", *command], check=True)
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        rows += [
            {
                "seed": seed,
                "seconds": report["seconds"],
                "weights": entry["weights"],
                "kl": entry["kl"],
                "reward": entry["reward"],
                "efficiency": entry["efficiency"],
                "decode_ratio": report["speed"]["tilted"]["ratio"],
            }
            for entry in report["efficiency"]
        ]
    results.write(arguments.name, vars(arguments), rows)


if __name__ == "__main__":
    main()
