"""`blipfit ranks`: which sublayers and layers kept AdaLoRA's ranks, as tables and a heat map."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from blipfit import run_folder as run_files
from blipfit import sublayers as sublayer_table
from blipfit.errors import UserError
from blipfit.report import figure_files
from blipfit.run_folder import Run

_BLOCK_NUMBER = re.compile(r"\.(?:layer|layers|block)\.(\d+)\.")


def run(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One record per finished AdaLoRA run; its heat map is written into its folder.

    Raises UserError if a folder is no finished AdaLoRA run.
    """
    return [_run_record(Run(folder)) for folder in folders]


def _run_record(run: Run) -> dict[str, Any]:
    folder, recipe = run.folder, run.recipe()
    if recipe.adapter.method != "adalora":
        raise UserError(f"{folder} was trained with {recipe.adapter.method}; only adalora distributes ranks")
    if run.state() != "finished":
        raise UserError(f"{folder} is not finished; run the same `blipfit train` again to continue it")
    history = run_files.read_json(run.ranks_file)
    record = {
        "run": str(folder),
        "title": recipe.title,
        "start_rank": history["start_rank"],
        "budget": history["budget"],
        "ranks": dict(zip(history["layers"], history["ranks"][-1], strict=True)),
        "sublayers": sublayers(history),
        "picture": str(run.ranks_picture),
    }
    draw_rank_figure(history, recipe.title, run.ranks_picture)
    return record


def sublayers(history: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By sublayer: layers, ranks at the start and at the end, layers without any rank at the end, and the ranks after
    each allocation."""
    parts: dict[str, dict[str, Any]] = {}
    for column, layer in enumerate(history["layers"]):
        part = parts.setdefault(
            sublayer_table.component_of(layer),
            {"layers": 0, "start": 0, "kept": 0, "empty": 0, "over_training": [0] * len(history["steps"])},
        )
        layer_ranks = [ranks[column] for ranks in history["ranks"]]
        part["layers"] += 1
        part["start"] += history["start_rank"]
        part["kept"] += layer_ranks[-1]
        part["empty"] += layer_ranks[-1] == 0
        part["over_training"] = [a + b for a, b in zip(part["over_training"], layer_ranks, strict=True)]
    return parts


def ranks_by_block(layers: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Kind of module (its name with `*` for the block number) → block number → rank."""
    kinds: dict[str, dict[int, int]] = {}
    for layer, rank in layers.items():
        match = _BLOCK_NUMBER.search(layer)
        assert match is not None, layer
        kind = layer[: match.start(1)] + "*" + layer[match.end(1) :]
        kinds.setdefault(kind, {})[int(match.group(1))] = rank
    return kinds


def run_tables(record: Mapping[str, Any]) -> list[Any]:
    """The ranks of one run by sublayer and by layer."""
    first = Table(title=f"{record['title']}: ranks by sublayer", title_justify="left")
    first.add_column("sublayer")
    for name in ("layers", "at the start", "at the end", "mean rank", "layers without any"):
        first.add_column(name, justify="right")
    for name, part in record["sublayers"].items():
        mean = f"{part['kept'] / part['layers']:.2f}"
        first.add_row(name, str(part["layers"]), str(part["start"]), str(part["kept"]), mean, str(part["empty"]))
    first.add_section()
    first.add_row("all", str(len(record["ranks"])), "", f"{sum(record['ranks'].values())}", style="bold")
    blocks = ranks_by_block(record["ranks"])
    columns = sorted({number for row in blocks.values() for number in row})
    second = Table(title="by layer", title_justify="left")
    second.add_column("module", overflow="fold")
    for number in columns:
        second.add_column(str(number), justify="right")
    for kind, row in blocks.items():
        second.add_row(kind, *(str(row.get(number, "")) for number in columns))
    return [first, second, _heat_map_line(record)]


def render(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One run in full, or several side by side."""
    if len(records) == 1:
        return run_tables(records[0])
    return [comparison_table(records), *(_heat_map_line(record) for record in records)]


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Several runs by sublayer: mean rank and share of all ranks, so that runs with different budgets compare."""
    table = Table(title="ranks by sublayer: mean rank of a layer, share of all", title_justify="left")
    table.add_column("sublayer")
    for record in records:
        table.add_column(record["title"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for record in records for name in record["sublayers"]):
        table.add_row(name, *(_format_ranks(record, name) for record in records))
    table.add_section()
    sums = [sum(record["ranks"].values()) for record in records]
    table.add_row("ranks in all", *map(str, sums), style="bold")
    starts = [
        f"{record['start_rank']} → {total / len(record['ranks']):.2f}"
        for record, total in zip(records, sums, strict=True)
    ]
    table.add_row("rank of a layer, start → end", *starts)
    return table


def _format_ranks(record: Mapping[str, Any], name: str) -> str:
    part = record["sublayers"].get(name)
    if part is None:
        return "–"
    return f"{part['kept'] / part['layers']:.2f}   {100 * part['kept'] / sum(record['ranks'].values()):3.0f} %"


def _heat_map_line(record: Mapping[str, Any]) -> str:
    return f"heat map: {record['picture']}"


def draw_rank_figure(history: Mapping[str, Any], title: str, file: Path) -> None:
    """Draw the heat map of the final ranks by kind of module and block number, and the mean rank of each sublayer
    over training."""
    import numpy as np
    from matplotlib.figure import Figure

    blocks = ranks_by_block(dict(zip(history["layers"], history["ranks"][-1], strict=True)))
    width = 1 + max(number for row in blocks.values() for number in row)
    heat = np.full((len(blocks), width), np.nan)
    for number, row in enumerate(blocks.values()):
        heat[number, list(row)] = list(row.values())
    figure = Figure(figsize=(10 + 0.2 * width, 2.5 + 0.3 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(heat, aspect="auto", cmap="viridis", vmin=0, vmax=history["start_rank"])
    left.set_yticks(range(len(blocks)), list(blocks), fontsize=7)
    left.set(xlabel="block", title=f"{title}: ranks")
    figure.colorbar(image, ax=left, label="rank")
    for name, part in sublayers(history).items():
        right.plot(
            history["steps"], [ranks / part["layers"] for ranks in part["over_training"]], label=name, marker="."
        )
    right.set(xlabel="optimizer step", ylabel="mean rank of a layer", ylim=(0, history["start_rank"] + 0.5))
    right.legend(fontsize=7)
    figure_files.save_figure(figure, file, dpi=130)
