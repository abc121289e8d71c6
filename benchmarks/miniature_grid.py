"""The published grid on the miniatures as a table, from the runs of `blipfit sweep icons 1-64 --model tiny`:
`python -m benchmarks.miniature_grid RESULTS/icons` keeps their figures and prints the table of docs/grid.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from blipfit import grid
from blipfit.report import terminal
from blipfit.run import Run


def collected(folder: Path) -> dict[str, Any]:
    """A row an experiment, from its `result.json`."""
    record: dict[str, Any] = {"experiments": {}}
    for number in grid.IDS:
        result = Run(folder / str(number)).result()
        test, recipe = result["metrics"]["test"], result["recipe"]
        record |= {"chance": test["chance"], "questions": result["counts"], "training": recipe["training"]}
        record["experiments"][result["experiment"]] = {
            "placement": terminal.placement(recipe["adapter"]),
            "rank": recipe["adapter"]["rank"],
            "trained": result["trained_parameters"],
            "share": result["trained_share"],
            "accuracy": test["accuracy"],
            "interval": test["interval"],
            "seconds": result["seconds"],
        }
    return record


def table(record: dict[str, Any]) -> str:
    """A row a placement and rank, Markdown: both families side by side."""
    rows = record["experiments"]
    lines = [
        "| ids | LoRA | rank | trained, T5 | accuracy, T5 | trained, Vicuna | accuracy, Vicuna |",
        "|---" * 7 + "|",
    ]
    half = len(grid.IDS) // 2
    for number in range(1, half + 1):
        pair = rows[str(number)], rows[str(number + half)]
        cells = [f"{one['trained']:,} | {_told(one)}" for one in pair]
        lines.append(
            f"| {number}, {number + half} | {pair[0]['placement']} | {pair[0]['rank']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _told(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['accuracy']:.1f} [{low:.0f}–{high:.0f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the run folders of all 64 experiments")
    record = collected(parser.parse_args(arguments).folder)
    measure.keep("miniature-grid", record)
    print(table(record))


if __name__ == "__main__":
    main()
