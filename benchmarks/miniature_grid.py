"""Makes the table of the published grid on the miniatures: `python -m benchmarks.miniature_grid RESULTS/icons`.

Reads the runs of `blipfit sweep icons 1-64 --model tiny`, writes their results to one file and prints the table of
docs/grid.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from blipfit import grid
from blipfit.report import terminal
from blipfit.run_folder import Run


def collect_results(folder: Path) -> dict[str, Any]:
    """Collect the row of every experiment from its `result.json`."""
    record: dict[str, Any] = {"experiments": {}}
    for number in grid.IDS:
        result = Run(folder / str(number)).result()
        test, recipe = result["metrics"]["test"], result["recipe"]
        record |= {"chance": test["chance"], "questions": result["counts"], "training": recipe["training"]}
        record["experiments"][result["experiment"]] = {
            "placement": terminal.format_placement(recipe["adapter"]),
            "rank": recipe["adapter"]["rank"],
            "trained": result["trained_parameters"],
            "share": result["trained_share"],
            "accuracy": test["accuracy"],
            "interval": test["interval"],
            "seconds": result["seconds"],
        }
    return record


def format_table(record: dict[str, Any]) -> str:
    """Format a Markdown table: one row per placement and rank, both families side by side."""
    rows = record["experiments"]
    lines = [
        "| ids | LoRA | rank | trained, T5 | accuracy, T5 | trained, Vicuna | accuracy, Vicuna |",
        "|---" * 7 + "|",
    ]
    half = len(grid.IDS) // 2
    for number in range(1, half + 1):
        pair = rows[str(number)], rows[str(number + half)]
        cells = [f"{row['trained']:,} | {_format_accuracy(row)}" for row in pair]
        lines.append(
            f"| {number}, {number + half} | {pair[0]['placement']} | {pair[0]['rank']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _format_accuracy(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['accuracy']:.1f} [{low:.0f}–{high:.0f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the run folders of all 64 experiments")
    record = collect_results(parser.parse_args(arguments).folder)
    measure.write_results("miniature-grid", record)
    print(format_table(record))


if __name__ == "__main__":
    main()
