"""`mavis report`: gather the runs of a sweep into one table and one plot."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mavis.cli.console import print_table
from mavis.cli.hydra_app import hydra_app


def _run(config: Any) -> None:
    from mavis.evaluation.sweeps.report import table_of_runs, write_runs
    from mavis.evaluation.sweeps.runs import gather_runs

    runs = gather_runs(config.folder)
    paths = write_runs(config.output or config.folder, runs, config.format)
    states = Counter(run["state"] for run in runs)
    title = f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}"
    print_table(title, [{name: cell for name, cell in row.items() if name != "error"} for row in table_of_runs(runs)])
    for run in runs:
        if run["error"]:
            print(f"{run['run']}: {run['error']}")
    print("\n".join(str(path) for path in paths))


def main() -> None:
    """Run the command with the process's arguments."""
    hydra_app("report")(_run)()


if __name__ == "__main__":
    main()
