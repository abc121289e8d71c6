"""`blipfit grid`: the 64 published experiments with their trained parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from blipfit import grid
from blipfit.adapters import parameter_counts
from blipfit.model import shapes
from blipfit.report import terminal


def run() -> list[dict[str, Any]]:
    """One record per experiment; parameters are counted on the modules of the published models."""
    records = []
    for number in grid.IDS:
        family, row, rank = grid.decode_id(number)
        recipe = grid.recipe("scienceqa", number)
        trained = parameter_counts.trained_parameters(shapes.on_meta(recipe.model.name), family, recipe.adapter)
        records.append(
            {
                "id": number,
                "llm": recipe.model.name,
                "llm_lora": list(row.llm),
                "qformer": row.qformer if row.qformer == "full" else list(row.qformer),
                "rank": rank,
                "trainable_parameters": sum(trained.values()),
            }
        )
    return records


def render(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The grid as a table, with a legend."""
    table = Table(
        title="the grid, published for scienceqa and iconqa; icons, own and rewardbench take the same ids",
        title_justify="left",
    )
    for name in ("id", "language model", "placement", "rank", "trained parameters"):
        table.add_column(name, justify="left" if name in ("language model", "placement") else "right")
    for record in records:
        placement = terminal.format_placement({"qformer": record["qformer"], "llm": record["llm_lora"]})
        model = record["llm"].removeprefix("Salesforce/instructblip-")
        parameters = f"{record['trainable_parameters']:,}"
        end_section = record["id"] % len(grid.RANKS) == 0
        table.add_row(str(record["id"]), model, placement, str(record["rank"]), parameters, end_section=end_section)
    legend = "QF: Q-Former, LLM: language model; full: all weights trained, otherwise LoRA"
    return [table, legend]
