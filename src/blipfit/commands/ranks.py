"""Where AdaLoRA's ranks went: tables by sublayer and layer, and a heat map over layers and over training."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from blipfit import run as runs
from blipfit.adapters import placement
from blipfit.errors import UserError
from blipfit.run import Run

_NUMBER = re.compile(r"\.(?:layer|layers|block)\.(\d+)\.")


def examine(folder: Path) -> dict[str, Any]:
    """The ranks of a finished AdaLoRA run, its heat map drawn beside it; UserError for any other folder."""
    run = Run(folder)
    recipe = run.recipe()
    if recipe.adapter.method != "adalora":
        raise UserError(f"{folder} was trained with {recipe.adapter.method}; only adalora chooses ranks by itself")
    if run.state() != "finished":
        raise UserError(f"{folder} is not finished; `blipfit train` with the same recipe continues it")
    history = runs.read_json(run.ranks_file)
    record = {
        "run": str(folder),
        "title": recipe.title,
        "start_rank": history["start_rank"],
        "budget": history["budget"],
        "ranks": dict(zip(history["layers"], history["ranks"][-1], strict=True)),
        "sublayers": sublayers(history),
        "picture": str(run.ranks_picture),
    }
    draw(history, recipe.title, run.ranks_picture)
    return record


def sublayers(history: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By sublayer: layers, ranks at the start and kept, layers left without any, and the kept after each allocation."""
    found: dict[str, dict[str, Any]] = {}
    for column, layer in enumerate(history["layers"]):
        part = found.setdefault(
            placement.component(layer),
            {"layers": 0, "start": 0, "kept": 0, "empty": 0, "over_training": [0] * len(history["steps"])},
        )
        kept = [ranks[column] for ranks in history["ranks"]]
        part["layers"] += 1
        part["start"] += history["start_rank"]
        part["kept"] += kept[-1]
        part["empty"] += kept[-1] == 0
        part["over_training"] = [one + other for one, other in zip(part["over_training"], kept, strict=True)]
    return found


def by_depth(layers: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Ranks by kind of module (its name with `*` for the block's number) and number of the block."""
    found: dict[str, dict[int, int]] = {}
    for layer, rank in layers.items():
        match = _NUMBER.search(layer)
        assert match is not None, layer
        kind = layer[: match.start(1)] + "*" + layer[match.end(1) :]
        found.setdefault(kind, {})[int(match.group(1))] = rank
    return found


def table(record: Mapping[str, Any]) -> list[Any]:
    """One run by sublayer and by layer."""
    first = Table(title=f"{record['title']}: ranks kept by sublayer", title_justify="left")
    first.add_column("sublayer")
    for name in ("layers", "at the start", "kept", "mean rank", "layers without any"):
        first.add_column(name, justify="right")
    for name, part in record["sublayers"].items():
        mean = f"{part['kept'] / part['layers']:.2f}"
        first.add_row(name, str(part["layers"]), str(part["start"]), str(part["kept"]), mean, str(part["empty"]))
    first.add_section()
    first.add_row("all", str(len(record["ranks"])), "", f"{sum(record['ranks'].values())}", style="bold")
    depths = by_depth(record["ranks"])
    columns = sorted({number for row in depths.values() for number in row})
    second = Table(title="by layer", title_justify="left")
    second.add_column("module", overflow="fold")
    for number in columns:
        second.add_column(str(number), justify="right")
    for kind, row in depths.items():
        second.add_row(kind, *(str(row.get(number, "")) for number in columns))
    return [first, second, heat_map(record)]


def shown(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `blipfit ranks` prints: one run in full, several side by side."""
    return table(records[0]) if len(records) == 1 else [*compared(records), *(heat_map(one) for one in records)]


def compared(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Several runs by sublayer: the mean rank kept, and its share of all ranks kept, so that budgets compare."""
    drawn = Table(title="ranks kept by sublayer: mean rank of a layer, share of all", title_justify="left")
    drawn.add_column("sublayer")
    for record in records:
        drawn.add_column(record["title"], justify="right", overflow="fold")
    for name in dict.fromkeys(name for record in records for name in record["sublayers"]):
        drawn.add_row(name, *(_kept(record, name) for record in records))
    drawn.add_section()
    sums = [sum(record["ranks"].values()) for record in records]
    drawn.add_row("ranks in all", *map(str, sums), style="bold")
    starts = [
        f"{record['start_rank']} → {kept / len(record['ranks']):.2f}"
        for record, kept in zip(records, sums, strict=True)
    ]
    drawn.add_row("rank of a layer, start → end", *starts)
    return [drawn]


def _kept(record: Mapping[str, Any], name: str) -> str:
    part = record["sublayers"].get(name)
    if part is None:
        return "–"
    return f"{part['kept'] / part['layers']:.2f}   {100 * part['kept'] / sum(record['ranks'].values()):3.0f} %"


def heat_map(record: Mapping[str, Any]) -> str:
    return f"heat map: {record['picture']}"


def draw(history: Mapping[str, Any], title: str, file: Path) -> None:
    """Write the heat map: final ranks by module and layer, and the mean rank of each sublayer over training."""
    import numpy as np
    from matplotlib.figure import Figure

    depths = by_depth(dict(zip(history["layers"], history["ranks"][-1], strict=True)))
    width = 1 + max(number for row in depths.values() for number in row)
    heat = np.full((len(depths), width), np.nan)
    for number, row in enumerate(depths.values()):
        heat[number, list(row)] = list(row.values())
    figure = Figure(figsize=(10 + 0.2 * width, 2.5 + 0.3 * len(depths)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    image = left.imshow(heat, aspect="auto", cmap="viridis", vmin=0, vmax=history["start_rank"])
    left.set_yticks(range(len(depths)), list(depths), fontsize=7)
    left.set(xlabel="block", title=f"{title}: ranks kept")
    figure.colorbar(image, ax=left, label="rank")
    for name, part in sublayers(history).items():
        right.plot(history["steps"], [kept / part["layers"] for kept in part["over_training"]], label=name, marker=".")
    right.set(xlabel="optimizer step", ylabel="mean rank of a layer", ylim=(0, history["start_rank"] + 0.5))
    right.legend(fontsize=7)
    with runs.replacing(file) as temporary:
        figure.savefig(temporary, dpi=130)
