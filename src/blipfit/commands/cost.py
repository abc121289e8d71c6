"""`blipfit cost`: what a model, a recipe or a finished run costs, as one record and a table."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import grid
from blipfit import recipe as recipes
from blipfit.adapters import count, peft_format, placement
from blipfit.errors import UserError
from blipfit.model import cost, latency, loading, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelConfig, Recipe
from blipfit.run import Run


def describe(
    what: str, experiment: str | None, model: str | None, lengths: Lengths, device: torch.device | None = None
) -> dict[str, Any]:
    """Cost of a model's name or folder, a run folder, a recipe file, or an experiment of a data set's grid.

    With a `device` the weights are loaded and one answer is measured there; without, shapes are enough.
    """
    recipe, run = _meant(what, experiment, model)
    name = recipe.model.name if recipe else model or what
    hf = shapes.on_meta(name)
    trained = count.trained(hf, shapes.family(name), recipe.adapter) if recipe else {}
    stored = _stored(run) if run else trained if recipe else count.total(hf)
    record: dict[str, Any] = {
        "what": str(run.folder) if run else recipe.title if recipe else what,
        "model": name,
        "parameters": {
            part: {"total": total, "trained": trained.get(part, 0), "stored": stored.get(part, 0)}
            for part, total in count.total(hf).items()
        },
        "trained_parameters": sum(trained.values()),
        "total_parameters": sum(count.total(hf).values()),
        "stored_parameters": sum(stored.values()),
        "lengths": asdict(lengths),
        "flops": cost.flops(hf.config, lengths),
        "weight_bytes": cost.loaded_bytes(hf),
        "adapter_bytes": _bytes(run.adapter) if run else None,
        "measured": None,
    }
    if device is not None:
        record["measured"] = _measured(name, recipe, run, lengths, device)
    return record


def _meant(what: str, experiment: str | None, model: str | None) -> tuple[Recipe | None, Run | None]:
    """The recipe and the run that a command line means; neither for a model."""
    run = Run(Path(what))
    if experiment is not None:
        return grid.recipe(what, experiment, model), None
    if what.endswith((".yaml", ".yml")):
        return recipes.load(Path(what)), None
    if run.recipe_file.exists():
        if run.state() != "finished":
            raise UserError(f"{what} is not finished; run the same `blipfit train` again to continue it")
        return run.recipe(), run
    if what in grid.trainable():
        raise UserError(f"say which experiment: `blipfit cost {what} 15`; `blipfit grid` lists them")
    return None, None


def _stored(run: Run) -> dict[str, int]:
    """Numbers in a run's adapter folder, by component."""
    counts: dict[str, int] = {}
    for name, tensor in peft_format.read(run.adapter)[1].items():
        part = placement.component(name)
        counts[part] = counts.get(part, 0) + tensor.numel()
    return counts


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _measured(
    name: str, recipe: Recipe | None, run: Run | None, lengths: Lengths, device: torch.device
) -> dict[str, Any]:
    if recipe:
        backbone = loading.load(recipe.model, recipe.training.precision, device, recipe.training.max_text_tokens)
    else:
        backbone = loading.load(ModelConfig(name=name), device=device)
    weights = cost.weight_bytes(backbone.hf)
    return {"weight_bytes": weights, **_with_adapter(backbone, run, lengths)}


def _with_adapter(backbone: Backbone, run: Run | None, lengths: Lengths) -> dict[str, Any]:
    if run is None:
        return latency.measure(backbone, lengths)
    bank, _ = peft_format.install(backbone, run.adapter)
    try:
        return latency.measure(backbone, lengths)
    finally:
        bank.remove()


# --------------------------------------------------------------------- shown

_STAGES = {
    "see": "see: one image",
    "query": "query: one question",
    "answer": "answer: a known answer, as in training",
    "rank": "rank: all candidates",
    "generate": "generate: as many tokens",
}


def shown(record: Mapping[str, Any]) -> list[Any]:
    """What `cost` prints."""
    lines = [f"{record['what']}" + (f" on {record['model']}" if record["model"] != record["what"] else "")]
    return [*lines, parameter_table(record), flop_table(record), *_sentences(record)]


def parameter_table(record: Mapping[str, Any]) -> Table:
    table = Table(title="parameters", title_justify="left")
    table.add_column("component")
    for name in ("total", "trained", "stored"):
        table.add_column(name, justify="right")
    for part, counts in record["parameters"].items():
        table.add_row(part, *(f"{counts[name]:,}" for name in ("total", "trained", "stored")))
    sums = [f"{record[f'{name}_parameters']:,}" for name in ("total", "trained", "stored")]
    table.add_row("sum", *sums, style="bold")
    return table


def flop_table(record: Mapping[str, Any]) -> Table:
    lengths = record["lengths"]
    table = Table(
        title=f"forward, {lengths['text']} text tokens, {lengths['answer']} of the answer, "
        f"{lengths['candidates']} candidates",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("GFLOP", justify="right")
    for stage, number in record["flops"].items():
        table.add_row(_STAGES[stage], gigaflops(number))
    return table


def gigaflops(number: float) -> str:
    """`20.1`, with three digits that say something."""
    return f"{number / 1e9:,.0f}" if number >= 1e11 else f"{number / 1e9:.3g}"


def size(count: float) -> str:
    """Bytes as `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _sentences(record: Mapping[str, Any]) -> list[str]:
    weights = record["weight_bytes"]
    lines = [
        f"weights: {size(weights['fp32'])} in fp32, {size(weights['16-bit'])} with 16 bits where they stay frozen",
    ]
    if record["adapter_bytes"] is not None:
        lines.append(f"adapter on disk: {size(record['adapter_bytes'])}")
    if (measured := record["measured"]) is not None:
        answer = measured["answer_s"]
        stages = ", ".join(f"{name} {1000 * times['median']:.1f}" for name, times in measured["stages_s"].items())
        lines.append(
            f"one answer on {measured['device']}: median {1000 * answer['median']:.1f} ms, 95 % within "
            f"{1000 * answer['p95']:.1f} ms ({stages})"
        )
        types = ", ".join(f"{name} {size(number)}" for name, number in measured["weight_bytes"].items())
        lines.append(f"weights as loaded: {types}")
        if measured["peak_bytes"] is not None:
            what = "allocated by torch" if measured["device"].startswith("cuda") else "resident, the whole process"
            lines.append(f"peak memory: {size(measured['peak_bytes'])} ({what})")
    return lines
